"""The memory engine against plain PyTorch: the same stage, microbatches, optimizer and recomputation.

A middle stage of a Llama-shaped model (hidden states in, gradients out) of 24 layers, in fp32 on the CPU with two
threads. Ours (`memory_child.py`) and the yardstick (`memory_plain.py`: no project import) are two processes that are
alive at once and take one step each in turn. A step of ours ends when its last byte is written.

Bytes are those of the pool (homes and slots of weights, gradients and moments) and, measured alike on both sides, the
most bytes of tensors that were alive at once within a step: activations, gradients that are made in it, temporaries.
What one operation allocates for itself is not seen; the peak RSS of the process, which has everything, is in the notes.

The state on NVMe lies in a temporary folder (`TMPDIR`), which has to be on a real disk. `--only ROW` measures a row.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peer.memory.moments import OptimizerName
from peer.memory.units import Inventory, Section
from protocol.architecture import num_parameters, stage_blocks
from protocol.layout import BlockKind
from tests.benchmarks.commands import CommandError
from tests.benchmarks.harness import Options, Pairs, Row, compare, figure, measure_pairs, run
from tests.benchmarks.memory_disk import RawDisk
from tests.benchmarks.memory_loss import optimizer_loss
from tests.benchmarks.memory_processes import OURS, PLAIN, Child, MemoryCap, ReportedClock, Steps, memory_cap

THREADS = 2
NUM_STAGES, STAGE = 3, 1
REPEATS = 7
WARMUP = 2
SLACK = 0.05  # what a median may miss its bar by, if the interval reaches it: the machine is not ours alone
MIB, GIB = 1 << 20, 1 << 30

CAP_BYTES = 2 * GIB
CAPPED_STEPS = 3
ALL_BYTES = 1 << 60
ACTIVATION_SHARE = 0.20  # of the bytes that keeping all takes: what a plan gets, neighbours' tensors included


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A middle stage and its wave."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int = 24
    microbatches: int = 4
    batch: int = 1
    length: int = 128

    @property
    def config(self) -> dict[str, Any]:
        """Return the config of the whole model, of which this stage is the middle third."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": NUM_STAGES * self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "intermediate_size": self.ffn,
            "vocab_size": 512,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    @property
    def parameters(self) -> int:
        return num_parameters(self.config, NUM_STAGES, STAGE)

    @property
    def wave(self) -> dict[str, int]:
        return {"microbatches": self.microbatches, "batch": self.batch, "length": self.length}

    @property
    def tokens(self) -> int:
        return self.microbatches * self.batch * self.length

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:.0f}M parameters, {self.layers} layers, d={self.hidden}, "
            f"{self.microbatches} x {self.batch * self.length} tokens"
        )


# four microbatches of 128 tokens are compute-bound on NVMe: the note of the `nvme` row has the seconds that it waited
FULL = Size(hidden=1024, ffn=2816, heads=16, kv_heads=16)
QUICK = Size(hidden=576, ffn=1536, heads=9, kv_heads=9)
# the layers of Llama-3.2-1B, 17 of them; a layer's weights (232 MiB) are eight shards
BILLION = Size(hidden=2048, ffn=8192, heads=32, kv_heads=8, layers=17, microbatches=2)
# waves for `balanced`, from short to long
WAVES = ((1, 16), (1, 32), (1, 64), (1, 128), (2, 128), (3, 128), (4, 128))


class Bench:
    """Starts the children of one run, in one temporary folder."""

    def __init__(self, size: Size, folder: Path, *, repeats: int = REPEATS) -> None:
        self.size, self.folder, self.repeats = size, folder, repeats
        self.clock = ReportedClock()

    @contextlib.contextmanager
    def ours(
        self, tier: str, size: Size | None = None, *, cap: MemoryCap | None = None, **options: Any
    ) -> Iterator[Child]:
        """Start our side with its state in `tier`; what it has on NVMe goes with it."""
        size = size or self.size
        with contextlib.ExitStack() as stack:
            if tier in ("nvme", "planned") or "nvme" in (options.get("parked"), options.get("spilled")):
                options["nvme"] = stack.enter_context(tempfile.TemporaryDirectory(dir=self.folder, prefix="nvme-"))
            child = stack.enter_context(
                Child((*(cap.wrapper if cap else ()), *OURS), env={"OMP_NUM_THREADS": str(THREADS)})
            )
            child.build(
                config=size.config,
                num_stages=NUM_STAGES,
                stage=STAGE,
                threads=THREADS,
                wave=size.wave,
                tier=tier,
                **options,
            )
            yield child

    @contextlib.contextmanager
    def plain(self, size: Size | None = None, **options: Any) -> Iterator[Child]:
        """Start the yardstick."""
        size = size or self.size
        with Child(PLAIN, env={"OMP_NUM_THREADS": str(THREADS)}) as child:
            child.build(
                config=size.config,
                first_layer=size.layers * STAGE,
                num_layers=size.layers,
                threads=THREADS,
                **options,
            )
            yield child

    def steps(self, child: Child, size: Size | None = None) -> Steps:
        return Steps(child, self.clock, (size or self.size).wave)

    def pairs(self, ours: Callable[[], float], reference: Callable[[], float]) -> Pairs:
        return measure_pairs(ours, reference, repeats=self.repeats, warmup=WARMUP, clock=self.clock)

    def live_bytes(self, child: Child, size: Size | None = None) -> int:
        """Return the most bytes of tensors that a step makes and holds at once. The step is not the child's first."""
        live: int = child.ask("live", number=0, **(size or self.size).wave)["bytes"]
        return live


# -- tiers ------------------------------------------------------------------------------------------


def tiers(bench: Bench, options: Options) -> Iterator[Row]:
    """`device`, `host` and `nvme`: time, and the bytes of the tiers that each of them is to spare.

    On NVMe with the state are the inputs of layers that wait to be recomputed.
    """
    bars = {"device": "<= 1.03", "host": "<= 1.10", "nvme": "<= 1.15"}
    wanted = [tier for tier in bars if options.wants(tier, f"{tier}_cpu", f"{tier}_bytes")]
    if not wanted:
        return
    with bench.plain() as plain:
        reference = bench.steps(plain)
        reference_bytes: int | None = None
        for tier in wanted:
            parked: dict[str, Any] = {"parked": "nvme"} if tier == "nvme" else {}
            with bench.ours(tier, **parked) as child:
                ours = bench.steps(child)
                stalls: list[float] = []
                pairs = bench.pairs(_noting(ours, stalls), reference)
                stall_s = statistics.median(stalls[WARMUP:])
                memory, plain_memory = child.ask("memory"), plain.ask("memory")
                live = bench.live_bytes(child)
            if reference_bytes is None:
                reference_bytes = plain_memory["device"] + bench.live_bytes(plain)
            note = f"{bench.size}; waited {stall_s:.2f} s of a step for copies"
            yield compare(tier, pairs, unit="s", bar=bars[tier], slack=SLACK, note=note)
            yield compare(f"{tier}_cpu", pairs, unit="CPU s", quantity="cpu_s")
            spared = {"device": memory["device"], "host": memory["device"], "nvme": memory["device"] + memory["host"]}
            yield figure(
                f"{tier}_bytes",
                (spared[tier] + live) / MIB,
                reference_bytes / MIB,
                unit="MiB",
                bar={"device": None, "host": "<= 0.30", "nvme": "<= 0.10"}[tier],
                note=f"pool {spared[tier] / MIB:.0f} and {live / MIB:.0f} made in a step; peak RSS of a fresh process "
                f"{memory['peak_rss'] / MIB:.0f} against {plain_memory['peak_rss'] / MIB:.0f} MiB",
            )


def _noting(steps: Steps, stalls: list[float]) -> Callable[[], float]:
    def once() -> float:
        wall_s = steps()
        stalls.append(steps.stalled_s)
        return wall_s

    return once


def balanced(bench: Bench, options: Options) -> Iterator[Row]:
    """State on NVMe, and a wave so short that the disk has about as much to do as the processor."""
    if not options.wants("balanced", "balanced_cpu"):
        return
    with bench.ours("nvme") as ours, bench.ours("device") as device:
        read_bytes, written_bytes = _bytes_per_step(bench, ours, bench.size)
        disk = RawDisk(
            bench.folder / "raw",
            file_bytes=int(bench.size.parameters * 6.1),
            request_bytes=_largest_unit_bytes(bench.size),
        )
        with disk:

            def io_s() -> float:
                return disk.move(read_bytes=read_bytes, written_bytes=written_bytes)

            raw_s = statistics.median(io_s() for _ in range(3))
            size = _balanced_size(bench, device, raw_s)
            compute = bench.steps(device, size)
            parts: list[tuple[float, float]] = []

            def reference() -> float:
                parts.append((compute(), io_s()))
                return max(parts[-1])

            stalls: list[float] = []
            pairs = bench.pairs(_noting(bench.steps(ours, size), stalls), reference)
    alone = [statistics.median(part) for part in zip(*parts[WARMUP:], strict=True)]
    note = (
        f"{size.microbatches} x {size.batch * size.length} tokens; alone, computing takes {alone[0]:.2f} s and I/O "
        f"{alone[1]:.2f} s ({read_bytes / alone[1] / 1e9:.2f} GB/s read with {written_bytes / alone[1] / 1e9:.2f} "
        f"written); waited {statistics.median(stalls[WARMUP:]):.2f} s"
    )
    yield compare("balanced", pairs, unit="s", bar="<= 1.20", slack=SLACK, note=note)


def _balanced_size(bench: Bench, device: Child, io_s: float) -> Size:
    """Return the wave whose computing takes closest to `io_s`."""
    found: list[tuple[float, Size]] = []
    for microbatches, length in WAVES:
        size = replace(bench.size, microbatches=microbatches, batch=1, length=length)
        steps = bench.steps(device, size)
        steps()
        compute_s = min(steps() for _ in range(2))
        found.append((abs(math.log(compute_s / io_s)), size))
        if compute_s > io_s:
            break
    return min(found, key=lambda each: each[0])[1]


# -- bytes ------------------------------------------------------------------------------------------


def traffic(bench: Bench, options: Options) -> Iterator[Row]:
    """Bytes at the disk per parameter and step, as the kernel counts them for the process."""
    rows, unit = ("nvme_read", "nvme_written"), "bytes per parameter and step"
    if options.wants(*rows, *(f"{row}_by_wave" for row in rows)):
        with bench.ours("nvme") as child:
            one = _bytes_per_parameter(bench, child, 1)
            eight = _bytes_per_parameter(bench, child, 8)
        for row, bar, of_one, of_eight in zip(rows, ("<= 10.1", "<= 6.1"), one, eight, strict=True):
            yield figure(row, of_eight, unit=unit, bar=bar, note="fp32 master, 8-bit moments, 8 microbatches")
            yield figure(f"{row}_by_wave", of_eight, of_one, unit=unit, bar="<= 1.01", note="8 microbatches against 1")
    if options.wants("nvme_written_compact", "nvme_read_compact"):
        with bench.ours("nvme", master="bf16-sr") as child:
            read, written = _bytes_per_parameter(bench, child, 8)
        note = "bf16 weights with stochastic rounding, 8-bit moments, 8 microbatches"
        yield figure("nvme_read_compact", read, unit=unit)
        yield figure("nvme_written_compact", written, unit=unit, bar="<= 4.1", note=note)


def _bytes_per_parameter(bench: Bench, child: Child, microbatches: int) -> tuple[float, float]:
    read, written = _bytes_per_step(bench, child, replace(bench.size, microbatches=microbatches))
    return read / bench.size.parameters, written / bench.size.parameters


def _bytes_per_step(bench: Bench, child: Child, size: Size, *, steps: int = 2) -> tuple[int, int]:
    """Return what the kernel counts as read and written in a step, once steps follow each other."""
    step = bench.steps(child, size)
    step()
    before = child.ask("io")
    for _ in range(steps):
        step()
    after = child.ask("io")
    return (after["read"] - before["read"]) // steps, (after["written"] - before["written"]) // steps


def activations(bench: Bench, options: Options) -> Iterator[Row]:
    """Activations by plan under a budget, all recomputed, or all spilled, against all kept; the state on the device.

    Bytes are those of the device. By plan they are what it takes there beyond weights and moments: it may well keep
    graphs on the device and move weights to host memory, which costs less. It is given no room for gradients, which its
    steps layer by layer do not need.
    """
    planned, recompute = ("activations", "activations_cpu", "activation_bytes"), ("recompute", "recompute_bytes")
    spill = ("spill", "spill_bytes")
    if not options.wants(*planned, *recompute, *spill):
        return
    with bench.ours("device", keep_bytes=ALL_BYTES) as keeping:
        reference = bench.steps(keeping)
        reference()
        all_bytes = bench.live_bytes(keeping)

        def against_all(child: Child) -> tuple[Pairs, int]:
            steps = bench.steps(child)
            steps()
            live = bench.live_bytes(child)
            return bench.pairs(steps, reference), live

        if options.wants(*planned):
            room = int(ACTIVATION_SHARE * all_bytes)
            state_bytes = _bytes_without_accumulators(bench.size)
            budgets: dict[str, Any] = {"device_bytes": state_bytes + room, "host_bytes": 2 * all_bytes, "nvme_bytes": 0}
            with bench.ours("planned", profile=_profile(bench), **budgets) as child:
                made = child.built["predicted"]
                pairs, live = against_all(child)
                live += child.ask("memory")["device"] - state_bytes
            note = (
                f"device: the state and {room / MIB:.0f} MiB; waves of {made['wave']}, {made['kept']} layers not "
                f"recomputed; {bench.size}"
            )
            yield compare("activations", pairs, unit="s", bar="<= 1.15", slack=SLACK, note=note)
            yield compare("activations_cpu", pairs, unit="CPU s", quantity="cpu_s")
            yield figure("activation_bytes", live / MIB, all_bytes / MIB, unit="MiB", bar="<= 0.20")
        ways: dict[tuple[str, str], tuple[dict[str, Any], str]] = {
            recompute: ({"parked": "host"}, "no graph kept; the inputs of the layers wait in host memory"),
            spill: ({"spilled": "host"}, "all graphs wait in host memory, which is the same memory here"),
        }
        for rows, (layout, note) in ways.items():
            if options.wants(*rows):
                with bench.ours("device", **layout) as child:
                    pairs, live = against_all(child)
                yield compare(rows[0], pairs, unit="s", note=note)
                yield figure(rows[1], live / MIB, all_bytes / MIB, unit="MiB")


def _profile(bench: Bench, *, nvme: Path | None = None) -> str:
    """Measure this machine for plans, in a fresh process."""
    size = bench.size
    with Child(OURS, env={"OMP_NUM_THREADS": str(THREADS)}) as child:
        spec = {"config": size.config, "batch": size.batch, "length": size.length, "threads": THREADS}
        found: str = child.ask("profile", nvme=None if nvme is None else str(nvme), **spec)["profile"]
    return found


def optimizer_bytes(bench: Bench, options: Options) -> Iterator[Row]:
    """The moments of AdamW in 8 bit against 32 bit: those of the layers, and those of a whole model beside them."""
    if not options.wants("optimizer_bytes", "optimizer_bytes_whole"):
        return
    config = bench.size.config
    middle = [_moment_bytes(config, NUM_STAGES, STAGE, name) for name in ("adamw8bit", "adamw32")]
    yield figure("optimizer_bytes", middle[0] / MIB, middle[1] / MIB, unit="MiB", bar="<= 0.26", note="the layers")
    vocabulary = 32_000
    whole = [
        _moment_bytes({**config, "num_hidden_layers": bench.size.layers, "vocab_size": vocabulary}, 1, 0, name)
        for name in ("adamw8bit", "adamw32")
    ]
    note = f"with embedding and head of {vocabulary} rows, which keep 32 bit"
    yield figure("optimizer_bytes_whole", whole[0] / MIB, whole[1] / MIB, unit="MiB", note=note)


def _moment_bytes(config: dict[str, Any], num_stages: int, stage: int, optimizer: str) -> int:
    inventory = _inventory(config, num_stages, stage, optimizer)
    return sum(map(inventory.num_bytes, inventory.units(Section.MOMENTS)))


def _largest_unit_bytes(size: Size) -> int:
    inventory = _inventory(size.config, NUM_STAGES, STAGE, "adamw8bit")
    return max(map(inventory.num_bytes, inventory.units(Section.WEIGHTS)))


def _bytes_without_accumulators(size: Size) -> int:
    """Return what weights and moments take: all that outlives a step that is taken layer by layer."""
    inventory = _inventory(size.config, NUM_STAGES, STAGE, "adamw8bit")
    lasting = (Section.WEIGHTS, Section.MOMENTS)
    return sum(inventory.num_bytes(unit) for section in lasting for unit in inventory.units(section))


def _inventory(config: dict[str, Any], num_stages: int, stage: int, optimizer: str) -> Inventory:
    names: dict[str, OptimizerName] = {"adamw8bit": "adamw8bit", "adamw32": "adamw32"}
    blocks = stage_blocks(config, num_stages, stage)
    assert num_stages == 1 or all(block.kind is BlockKind.LAYER for block in blocks)
    return Inventory(blocks, names[optimizer])


def depth(bench: Bench, options: Options) -> Iterator[Row]:
    """Device and host bytes of a stage of 12 and of 48 layers, with state and inputs of layers on NVMe."""
    if not options.wants("depth"):
        return
    found = []
    for layers in (12, 48):
        size = replace(bench.size, layers=layers)
        with bench.ours("nvme", size, parked="nvme") as child:
            bench.steps(child, size)()
            memory, live = child.ask("memory"), bench.live_bytes(child, size)
        found.append((memory["device"] + memory["host"], live, memory["peak_rss"]))
    (pool, live, rss), (deep_pool, deep_live, deep_rss) = found
    note = (
        f"pool {pool / MIB:.0f} and {deep_pool / MIB:.0f}, made in a step {live / MIB:.0f} and {deep_live / MIB:.0f} "
        f"MiB; peak RSS {rss / MIB:.0f} and {deep_rss / MIB:.0f} MiB; {size.microbatches} x {size.length} tokens"
    )
    yield figure("depth", (deep_pool + deep_live) / MIB, (pool + live) / MIB, unit="MiB", bar="< 1.05", note=note)


def planned(bench: Bench, options: Options) -> Iterator[Row]:
    """What the operating system saw of a plan against what the plan predicted. The budgets need all three tiers."""
    if not options.wants("plan_memory", "plan_time"):
        return
    size = bench.size
    profile = _profile(bench, nvme=bench.folder)
    budgets: dict[str, Any] = {
        "device_bytes": 2 * size.parameters,
        "host_bytes": 2 * size.parameters,
        "nvme_bytes": 1 << 40,
    }
    with bench.ours("planned", profile=profile, **budgets) as child:
        steps = bench.steps(child)
        walls = [steps() for _ in range(WARMUP + bench.repeats)][WARMUP:]
        memory = child.ask("memory")
        predicted = child.built["predicted"]
    where = ", ".join(f"{predicted[tier] / MIB:.0f} MiB on {tier}" for tier in ("device", "host", "nvme"))
    rss, step_s = memory["peak_rss"], statistics.median(walls)
    note = (
        f"peak RSS of a fresh process {rss / MIB:.0f} MiB, predicted {predicted['process'] / MIB:.0f}; {where}, waves "
        f"of {predicted['wave']}, {predicted['kept']} layers not recomputed"
    )
    yield figure("plan_memory", abs(rss / predicted["process"] - 1), unit="off", bar="<= 0.10", note=note)
    note = (
        f"{step_s:.2f} s ({min(walls):.2f} - {max(walls):.2f}), predicted {predicted['step_s']:.2f} s, of it "
        f"{predicted['stall_s']:.2f} s waiting; {size}"
    )
    yield figure("plan_time", abs(step_s / predicted["step_s"] - 1), unit="off", bar="<= 0.25", note=note)


def hard_cap(bench: Bench, options: Options) -> Iterator[Row]:
    """A stage of a billion parameters in a process that the kernel holds to 2 GiB."""
    if not options.wants("hard_cap"):
        return
    bar = f">= {CAPPED_STEPS}"
    with contextlib.ExitStack() as stack:
        try:
            cap = stack.enter_context(memory_cap(CAP_BYTES))
        except OSError as error:
            yield figure("hard_cap", 0, unit="steps", bar=bar, note=f"not run: no memory cap can be set here ({error})")
            return
        walls: list[float] = []
        ended = ""
        try:
            with bench.ours("nvme", BILLION, cap=cap) as child:
                step = bench.steps(child, BILLION)
                for _ in range(CAPPED_STEPS):
                    walls.append(step())
                rss = child.ask("memory")["peak_rss"]
            ended = f"{statistics.median(walls):.1f} s per step, peak RSS {rss / MIB:.0f} MiB"
        except CommandError as error:
            ended = str(error)
        note = f"{BILLION}, at most {CAP_BYTES / GIB:g} GiB and no swap: peak {cap.peak_bytes() / MIB:.0f} MiB; {ended}"
        yield figure("hard_cap", len(walls), unit="steps", bar=bar, note=note)


def measure(options: Options) -> Iterator[Row]:
    """Measure every row that is wanted, the short ones first."""
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="handcar-bench-") as name:
        bench = Bench(size, Path(name), repeats=options.repeats_or(quick=REPEATS, full=REPEATS))
        for rows in (optimizer_bytes, tiers, balanced, traffic, activations, planned, depth, hard_cap):
            yield from rows(bench, options)
        yield from optimizer_loss(bench.folder, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    return run("memory: a stage in the memory engine against plain PyTorch", measure, argv)


if __name__ == "__main__":
    sys.exit(main())
