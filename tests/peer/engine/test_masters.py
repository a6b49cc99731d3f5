"""How weights are kept: as fp32, as bf16 with the remainder to fp32, as bf16 rounded at random.

Oracles: plain fp32 AdamW from the same gradients; torch's bfloat16; training with everything on the device.
"""

from __future__ import annotations

import functools
import io
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from peer.engine.optimizer import AdamW, OptimizerSpec, field_view
from peer.engine.rounding import join
from peer.engine.stage_engine import StageEngine
from peer.memory.moments import MasterName, OptimizerName, groups, moment_bytes, moment_fields
from peer.memory.placement import Placement, Tier, all_on_device, footprint
from peer.memory.units import SLOTTED, Inventory, Section, Unit
from peer.model.blocks import named_views
from protocol import architecture
from protocol import layout as layouts
from protocol.architecture import preset, stage_blocks
from protocol.control import STATE_PARTS
from protocol.errors import ConfigError, StorageError
from protocol.ids import Version
from protocol.layout import BlockLayout
from tests.peer.engine import poke
from tests.peer.engine.placed import (
    MICROBATCHES,
    TINY,
    MakePlacement,
    Outcome,
    hidden,
    in_host,
    in_host_with_one_slot,
    on_nvme,
    same,
    tokens,
    train,
)
from tests.peer.engine.stored import half_and_half

CPU = torch.device("cpu")
MASTERS: tuple[MasterName, ...] = get_args(MasterName)
NARROW: tuple[MasterName, ...] = ("bf16+16", "bf16-sr")
STAGES = (0, 1, 2)
# as in test_optimizer.py: some matrices are no multiple of 256 elements, so that the padding has work to do
CONFIG = {**preset("tiny"), "hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 22}
CONFIG |= {"intermediate_size": 90, "num_hidden_layers": 1}


def use_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "SHARD_ELEMENTS", 8192)
    monkeypatch.setattr(architecture, "TABLE_ELEMENTS", 64 * 300)


def engine_of(
    master: MasterName,
    stage: int = 2,
    placement: MakePlacement = all_on_device,
    *,
    seed: int = 2,
    nvme: Path | None = None,
) -> StageEngine:
    return StageEngine.build(
        TINY,
        num_stages=3,
        stage=stage,
        optimizer=OptimizerSpec(master=master),
        seed=seed,
        placement=placement,
        nvme=nvme,
    )


def is_bf16(values: Tensor) -> bool:
    return torch.equal(values.to(torch.bfloat16).to(torch.float32), values)


# -- single shards ----------------------------------------------------------------------------------------------------


class Kept:
    """One block as an optimizer keeps it."""

    def __init__(self, block: BlockLayout, name: OptimizerName, master: MasterName) -> None:
        self.block, self.name, self.master = block, name, master
        self.optimizer = AdamW(OptimizerSpec(name=name, master=master, weight_decay=0.05, rounding_seed=3), CPU)
        self.weights = torch.zeros(block.num_elements)
        generator = torch.Generator().manual_seed(1)
        for view in named_views(block, self.weights).values():
            view.normal_(0, 0.1, generator=generator)
        self.moments = [
            torch.full((moment_bytes(shard, name, master),), 7, dtype=torch.uint8) for shard in block.shards()
        ]
        for shard, moments in zip(block.shards(), self.moments, strict=True):
            self.optimizer.begin(shard, self.weights[shard.start : shard.stop], moments)

    def step(self, number: int) -> None:
        gradient = torch.zeros(self.block.num_elements)
        generator = torch.Generator().manual_seed(100 + number)
        for view in named_views(self.block, gradient).values():
            view.normal_(0, 1, generator=generator)
        for shard, moments in zip(self.block.shards(), self.moments, strict=True):
            part = slice(shard.start, shard.stop)
            self.optimizer.step(
                shard, self.weights[part], gradient[part], moments, step=number + 1, learning_rate=1e-3 * (number + 1)
            )

    def masters(self) -> Tensor:
        """Return the weights with the remainders put back."""
        joined = self.weights.clone()
        for shard, moments in zip(self.block.shards(), self.moments, strict=True):
            own = joined[shard.start : shard.stop]
            parts = dict(groups(shard))
            for field in moment_fields(shard, self.name, self.master):
                if field.name == "remainder":
                    join(own[parts[field.group]], field_view(moments, field))
        return joined


@pytest.mark.parametrize("name", ["adamw32", "adamw8bit"])
@pytest.mark.parametrize("limit", [layouts.SHARD_ELEMENTS, 8192])
def test_masters_with_a_remainder_follow_fp32_bit_for_bit(
    name: OptimizerName, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the fp32 form of the same optimizer on every block of a model, weights and moments, after every step."""
    monkeypatch.setattr(layouts, "SHARD_ELEMENTS", limit)
    for block in stage_blocks(CONFIG, 1, 0):
        plain, kept = Kept(block, name, "fp32"), Kept(block, name, "bf16+16")
        assert torch.equal(kept.masters(), plain.weights)
        for number in range(4):
            plain.step(number)
            kept.step(number)
            assert torch.equal(kept.masters(), plain.weights)
            assert not torch.equal(kept.weights, plain.weights)
        for shard, ours, theirs in zip(block.shards(), kept.moments, plain.moments, strict=True):
            own = {(f.group, f.name): field_view(ours, f) for f in moment_fields(shard, name, "bf16+16")}
            for field in moment_fields(shard, name, "fp32"):
                assert torch.equal(own[field.group, field.name], field_view(theirs, field))


@pytest.mark.parametrize("name", ["adamw32", "adamw8bit"])
@pytest.mark.parametrize("master", NARROW)
def test_the_model_sees_bf16_and_the_padding_stays_zero(name: OptimizerName, master: MasterName) -> None:
    """Oracle: torch's bfloat16; after drawing and after every step."""
    for block in stage_blocks(CONFIG, 1, 0):
        kept = Kept(block, name, master)
        for number in range(3):
            assert is_bf16(kept.weights)
            assert not any(kept.weights[start:end].any() for start, end in block.padding())
            before = kept.weights.clone()
            kept.step(number)
            assert not torch.equal(kept.weights, before)
        assert is_bf16(kept.weights)


def test_rounding_at_random_stays_where_fp32_goes_on_average() -> None:
    """Oracle: fp32 AdamW; the mean error of a layer's matrices within five standard deviations of zero, where each step
    moves a weight by less than half of what bf16 can tell apart."""
    block = stage_blocks(CONFIG, 1, 0)[1]
    plain, kept = Kept(block, "adamw32", "fp32"), Kept(block, "adamw32", "bf16-sr")
    plain.weights.copy_(kept.weights)
    for number in range(5):
        plain.step(number)
        kept.step(number)
    error = (kept.weights - plain.weights)[: block.num_matrix_elements].double()
    assert error.any()
    assert abs(float(error.mean())) < 5 * float(error.std()) / error.numel() ** 0.5


def test_an_unknown_way_to_keep_weights_is_refused() -> None:
    """Oracle: ConfigError, whose hint names those that there are."""
    with pytest.raises(ConfigError) as caught:
        OptimizerSpec(master="fp16")  # type: ignore[arg-type]
    assert all(master in caught.value.hint for master in MASTERS)


# -- engines ----------------------------------------------------------------------------------------------------------


@functools.cache
def yardstick(master: MasterName, stage: int) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        use_cut(patch)
        return train(engine_of(master, stage))


PLACEMENTS: dict[str, MakePlacement] = {
    "host": in_host,
    "host, one slot": in_host_with_one_slot,
    "nvme": on_nvme,
    "half": half_and_half,
}


@pytest.mark.parametrize("wave", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("master", NARROW)
def test_training_does_not_depend_on_placement_and_wave(
    master: MasterName, stage: int, placement: str, wave: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights are half as long at home as on the device. Oracle: everything on the device, one by one."""
    use_cut(monkeypatch)
    nvme = tmp_path / "s" if placement in ("nvme", "half") else None
    with closing(engine_of(master, stage, PLACEMENTS[placement], nvme=nvme)) as engine:
        assert same(train(engine, wave=wave, step_inside=wave == 4), yardstick(master, stage))
        assert all(is_bf16(tensor) for tensor in engine.weight_tensors().values())


def test_masters_make_a_difference() -> None:
    """Oracle: three digests. Or the tests above compare what is the same anyway."""
    assert len({yardstick(master, 1).digests[-1] for master in MASTERS}) == 3


def test_the_run_decides_the_rounding() -> None:
    """Oracle: the weights of two runs with the same gradients and different seeds; of one run, twice."""
    digests = []
    for seed in (0, 0, 1):
        spec = OptimizerSpec(master="bf16-sr", rounding_seed=seed)
        engine = StageEngine.build(TINY, num_stages=3, stage=1, optimizer=spec, seed=2)
        train(engine, versions=range(1))
        digests.append(engine.state_digest())
    assert digests[0] == digests[1] != digests[2]


def test_an_engines_masters_follow_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same sums, as averaging brings them. Oracle: the fp32 engine's weights, padding included."""
    use_cut(monkeypatch)
    plain, kept = engine_of("fp32"), engine_of("bf16+16")
    sums = [torch.randn(len(each), generator=torch.Generator().manual_seed(3)) for each in plain.gradient_shards()]

    def load(number: int, out: Tensor) -> None:
        out.copy_(sums[number])

    for _ in range(3):
        for engine in (plain, kept):
            engine.step(1e-2, scale=0.25, load=load)
    for block, layout in enumerate(kept._stage.layouts):
        masters = poke.weights(kept, block).clone()
        for number, shard in enumerate(layout.shards()):
            parts, own = dict(groups(shard)), masters[shard.start : shard.stop]
            for field in moment_fields(shard, "adamw8bit", "bf16+16"):
                if field.name == "remainder":
                    join(own[parts[field.group]], field_view(poke.moments(kept, block, number), field))
        assert torch.equal(masters, poke.weights(plain, block))


# -- files ------------------------------------------------------------------------------------------------------------


def saved(engine: StageEngine) -> dict[str, io.BytesIO]:
    files = {part: io.BytesIO() for part in STATE_PARTS}
    engine.write_state(files)
    for file in files.values():
        file.seek(0)
    return files


@pytest.mark.parametrize("placement", [all_on_device, in_host_with_one_slot])
@pytest.mark.parametrize("master", MASTERS)
def test_state_files_hold_all_of_it(
    master: MasterName, placement: MakePlacement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the undisturbed engine: digests of the state, and of training on from it."""
    use_cut(monkeypatch)
    with closing(engine_of(master)) as before, closing(engine_of(master, placement=placement, seed=9)) as after:
        train(before, versions=range(1))
        after.read_state(saved(before), version=Version(1))
        assert after.state_digest() == before.state_digest()
        again = [train(engine, versions=range(1, 2)) for engine in (before, after)]
        assert same(*again)


@pytest.mark.parametrize("theirs", MASTERS)
@pytest.mark.parametrize("ours", MASTERS)
def test_files_of_another_form_are_refused_unless_they_hold_as_much(ours: MasterName, theirs: MasterName) -> None:
    """A remainder more or less is noticed. fp32 and bf16-sr have the same tensors, so only the run's manifest keeps
    them apart. Oracle: StorageError, with nothing changed."""
    own, other = engine_of(ours), engine_of(theirs)
    before = own.state_digest()
    if (ours == "bf16+16") == (theirs == "bf16+16"):
        own.read_state(saved(other), version=Version(0))
        return
    with pytest.raises(StorageError, match="does not fit this stage"):
        own.read_state(saved(other), version=Version(0))
    assert own.state_digest() == before


# -- bytes ------------------------------------------------------------------------------------------------------------

BYTES = {
    # at home and in transfers: weights; gradient; moments of 8 bit, with a scale per 256 elements; moments of 32 bit
    "fp32": (4, 4, 2 + 8 / 256, 8),
    "bf16+16": (2, 4, 4 + 8 / 256, 10),
    "bf16-sr": (2, 4, 2 + 8 / 256, 8),
}


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw32"])
@pytest.mark.parametrize("master", MASTERS)
def test_bytes_per_element_are_those_of_the_table(master: MasterName, optimizer: OptimizerName) -> None:
    """Oracle: the table, for a layer of `demo`; on the device weights are always fp32."""
    layer = stage_blocks(preset("demo"), 1, 0)[1]
    inventory = Inventory([layer], optimizer, master)
    weights, gradient, in_8_bit, in_32_bit = BYTES[master]
    moments = in_8_bit if optimizer == "adamw8bit" else in_32_bit
    for section, expected in zip(SLOTTED, (weights, gradient, moments), strict=True):
        units = inventory.block_units(0, section)
        found = sum(map(inventory.num_bytes, units)) / layer.num_elements
        assert found == pytest.approx(expected, rel=0.02 if section is Section.MOMENTS else 1e-9)
        on_device = sum(map(inventory.device_bytes, units)) / layer.num_elements
        assert on_device == pytest.approx(4 if section is Section.WEIGHTS else found)
        assert [inventory.is_narrow(unit) for unit in units] == [section is Section.WEIGHTS and master != "fp32"] * len(
            units
        )


@pytest.mark.parametrize("master", MASTERS)
def test_what_moves_is_what_the_inventory_says(master: MasterName) -> None:
    """Oracle: bytes counted by the pool in one pass of a wave with its step, by hand: each layer's weights come and go,
    and each shard's moments."""
    with closing(engine_of(master, 1, in_host_with_one_slot)) as engine:
        engine._memory.settle()
        pool = engine._memory.pool
        layers, parameters = 2, engine._stage.layouts[0].num_elements
        before = pool.traffic.fetched[Tier.HOST], pool.traffic.flushed[Tier.HOST]
        train(engine, wave=MICROBATCHES, step_inside=True, versions=range(1))
        engine._memory.settle()
        fetched, flushed = (
            pool.traffic.fetched[Tier.HOST] - before[0],
            pool.traffic.flushed[Tier.HOST] - before[1],
        )
        moments = sum(pool.inventory.num_bytes(unit) for unit in pool.inventory.units(Section.MOMENTS))
        weights = BYTES[master][0] * parameters
        assert flushed == layers * weights + moments
        # up: 1, 2; down: 1, as 2 is still there; then the digest reads 2, as 1 is still there, and all moments again
        assert fetched == 4 * weights + 2 * moments


def test_a_narrow_form_saves_half_of_the_weights_at_home() -> None:
    """Oracle: footprints. On the device nothing is saved."""
    sizes = {}
    for master in MASTERS:
        inventory = Inventory(stage_blocks(preset("demo"), 1, 0), "adamw8bit", master)
        units = [unit for section in Section for unit in inventory.units(section)]
        placement = Placement(homes=dict.fromkeys(units, Tier.HOST), slots=in_host(inventory).slots)
        sizes[master] = footprint(inventory, placement)
        weights = sum(inventory.num_bytes(unit) for unit in inventory.units(Section.WEIGHTS))
        assert weights == (4 if master == "fp32" else 2) * sum(block.num_elements for block in inventory.blocks)
        assert inventory.device_bytes(Unit(0, Section.WEIGHTS, 0)) == 4 * inventory.shards[0][0].num_elements
    assert (
        sizes["bf16-sr"][Tier.HOST] < sizes["bf16+16"][Tier.HOST] == pytest.approx(sizes["fp32"][Tier.HOST], rel=1e-3)
    )
    assert sizes["bf16-sr"][Tier.DEVICE] == sizes["fp32"][Tier.DEVICE]


def test_losses_are_close_whatever_the_form() -> None:
    """Not an exact oracle: three engines on the same microbatches end within a hundredth of each other."""
    losses = []
    for master in MASTERS:
        engine = engine_of(master)
        for _ in range(5):
            result = engine.loss_and_backward(hidden(1), tokens(1))
            engine.step(1e-3, scale=1 / 16)
        losses.append(result.loss_sum / result.target_tokens)
    assert max(losses) - min(losses) < 0.01 * min(losses)
