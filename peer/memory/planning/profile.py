"""What a machine takes for the pieces of training, in seconds and bytes: the prices that a plan is made from. Pure.

Owns: `Profile`, its JSON, and a profile by calculation for machines that are not at hand. Must not know: torch, how
anything is measured (`measure.py`), what a plan does with it (`simulate.py`, `plan.py`).

A profile is of one model's width and one size of microbatch. Blocks of one kind differ in size at most by the rows of
a table, so what was measured on one is scaled to another by its matrix elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from peer.memory.moments import OptimizerName, groups, is_in_8_bit
from peer.memory.pages import ALIGNMENT_BYTES, padded
from peer.memory.placement import Tier
from peer.memory.units import ELEMENT_BYTES
from protocol.errors import ConfigError
from protocol.layout import BlockKind, BlockLayout, ShardLayout

# peer/model/loss.py puts as many tokens through the head at once as make this many bytes of logits; torch's logsumexp
# needs a second piece of the same size
LOGIT_BYTES = 64 << 20

# peer/engine/optimizer.py bounds what bitsandbytes' CPU path copies to this; its CUDA kernel copies nothing
STEP_WORKSPACE_BYTES = 20 << 20
STEP_BYTES_PER_ELEMENT = 20  # of it, where a shard is shorter than that

MAX_PIECES = 32  # tensors that a segment's graph saves: some ten

_TOKEN_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """What one microbatch takes in one block."""

    forward_s: float
    """Of the forward pass; of a head's block, of its part of the scores."""
    backward_s: float
    """Of the backward pass, without recomputing the forward pass; of a head's block, of its part of the loss."""
    num_matrix_elements: int
    """Of the block that was measured."""
    graph_bytes: tuple[int, ...] = ()
    """What autograd saves in the forward pass besides weights, by segment."""
    workspace_bytes: int = 0
    """What the backward pass takes on top of the graph while it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A tier's way to the device and back, in bytes per second that can be kept up."""

    in_bytes_per_s: float
    out_bytes_per_s: float
    compute_share: float = 0.0
    """Which share of computing stands still while a copy runs: where the processor itself computes and copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One machine, with one model and one size of microbatch."""

    machine: str
    sequences: int
    sequence_length: int
    width: int
    blocks: Mapping[BlockKind, BlockCost]
    step_8bit_s: float
    """Per element of a shard's 8-bit part."""
    step_32bit_s: float
    clear_s: float
    """Per element of a gradient that is set to zero."""
    host: Link
    nvme: Link | None = None
    """None: no drive was measured."""
    step_workspace_bytes: int = 0
    process_bytes: int = 0
    """Of the process while it holds no state: Python, torch, their libraries, and what these keep once used."""
    gap_share: float = 0.0
    """Which share of activations and working space their allocator takes on top of it, where that is the host's."""
    is_host_memory: bool = False
    """Whether the device's memory is the host's, as on a machine without a card."""

    def __post_init__(self) -> None:
        counts = (self.sequences, self.sequence_length, self.width)
        times = (self.step_8bit_s, self.step_32bit_s, self.clear_s)
        if min(counts) < 1 or min(times) < 0 or BlockKind.LAYER not in self.blocks:
            raise ValueError(f"the profile of {self.machine} makes no sense")

    @property
    def num_tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.sequences * self.sequence_length

    @property
    def entry_bytes(self) -> int:
        """Size of a microbatch's hidden states, which is that of a block's input and of the gradient by it."""
        return self.num_tokens * self.width * ELEMENT_BYTES

    @property
    def token_bytes(self) -> int:
        """Size of a microbatch's token ids."""
        return self.num_tokens * _TOKEN_BYTES

    def link(self, tier: Tier) -> Link:
        """Return the way between a tier and the device."""
        link = self.host if tier is Tier.HOST else self.nvme
        assert link is not None, "nothing can live on a drive that was not measured"
        return link

    def forward_s(self, block: BlockLayout) -> float:
        """Return the seconds of one microbatch's forward pass (of a head: of its scores)."""
        return self.blocks[block.kind].forward_s * self._size(block)

    def backward_s(self, block: BlockLayout) -> float:
        """Return the seconds of one microbatch's backward pass, without recomputation (of a head: of its loss)."""
        return self.blocks[block.kind].backward_s * self._size(block)

    def segment_bytes(self, block: BlockLayout, index: int) -> int:
        """Return what the graph of one segment has saved."""
        return self.blocks[block.kind].graph_bytes[index]

    def place_bytes(self, block: BlockLayout, index: int) -> int:
        """Return the room that this takes outside the device."""
        return place_bytes(self.segment_bytes(block, index))

    def segment_forward_s(self, block: BlockLayout, index: int) -> float:
        """Return the seconds of one segment's forward pass, in proportion to its arithmetic."""
        flop = segment_flop(block, self.sequences, self.sequence_length)
        return self.forward_s(block) * flop[index] / sum(flop)

    def workspace_bytes(self, block: BlockLayout) -> int:
        return self.blocks[block.kind].workspace_bytes

    def step_s(self, shard: ShardLayout, optimizer: OptimizerName) -> float:
        """Return the seconds of the optimizer's step on one shard."""
        seconds = 0.0
        for name, part in groups(shard):
            each_s = self.step_8bit_s if is_in_8_bit(shard, name, optimizer) else self.step_32bit_s
            seconds += (part.stop - part.start) * each_s
        return seconds

    def to_json(self) -> str:
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Profile:
        """Read what `to_json` wrote. Raises `ConfigError` if it is something else."""
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ConfigError(f"this is not the profile of a machine: {where}: {first['msg']}.") from None

    def _size(self, block: BlockLayout) -> float:
        if block.kind not in (BlockKind.LAYER, BlockKind.HEAD):
            return 1.0  # a look-up and a norm depend on the tokens alone
        return block.num_matrix_elements / self.blocks[block.kind].num_matrix_elements


_ADAPTER = TypeAdapter(Profile)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The data sheet of a machine, as far as training asks for it. Rates are what can be kept up, not peaks."""

    name: str
    flop_per_s: float
    device_memory_bytes_per_s: float
    link_bytes_per_s: float
    """Between host memory and the device, each way."""
    nvme_read_bytes_per_s: float | None = None
    nvme_write_bytes_per_s: float | None = None
    """Once the drive's fast cache is full, which is after some 100 GB."""


def calculated(machine: Machine, blocks: Iterable[BlockLayout], *, sequences: int, sequence_length: int) -> Profile:
    """Return the profile that a machine should have by its data sheet. Nobody measured it."""
    largest = {block.kind: block for block in sorted(blocks, key=lambda block: block.num_matrix_elements)}
    layer = largest[BlockKind.LAYER]
    width = _shape(layer, "q_proj")[1]
    num_tokens = sequences * sequence_length
    pass_over_hidden_s = ELEMENT_BYTES * num_tokens * width / machine.device_memory_bytes_per_s

    def cost(block: BlockLayout) -> BlockCost:
        forward_s = forward_flop(block, sequences, sequence_length) / machine.flop_per_s
        match block.kind:
            case BlockKind.LAYER:
                times = forward_s, 2 * forward_s
            case BlockKind.HEAD:
                times = forward_s, 3 * forward_s  # the logits once more, and both gradients
            case _:
                times = 3 * pass_over_hidden_s, 6 * pass_over_hidden_s  # read, write and a little else
        return BlockCost(
            forward_s=times[0],
            backward_s=times[1],
            num_matrix_elements=block.num_matrix_elements,
            graph_bytes=graph_bytes(block, sequences, sequence_length),
            workspace_bytes=workspace_bytes(block, num_tokens),
        )

    return Profile(
        machine=machine.name,
        sequences=sequences,
        sequence_length=sequence_length,
        width=width,
        blocks={kind: cost(block) for kind, block in largest.items()},
        # bytes that the kernels move: weight twice, gradient once, and both moments there and back
        step_8bit_s=(3 * 4 + 4 * 1) / machine.device_memory_bytes_per_s,
        step_32bit_s=(3 * 4 + 4 * 4) / machine.device_memory_bytes_per_s,
        clear_s=ELEMENT_BYTES / machine.device_memory_bytes_per_s,
        host=Link(in_bytes_per_s=machine.link_bytes_per_s, out_bytes_per_s=machine.link_bytes_per_s),
        nvme=_drive(machine),
        process_bytes=700 << 20,  # torch, transformers and bitsandbytes on the CPU, measured
    )


def segment_flop(block: BlockLayout, sequences: int, sequence_length: int) -> tuple[float, ...]:
    """Count the arithmetic of a forward pass by segment: the matrices, and causal attention."""
    num_tokens = sequences * sequence_length
    flop = 2.0 * block.num_matrix_elements * num_tokens
    if block.kind is not BlockKind.LAYER:
        return (max(flop, 1.0),)
    (ffn, width), query = _shape(block, "gate_proj"), _shape(block, "q_proj")[0]
    feed_forward = 2.0 * 3 * ffn * width * num_tokens
    scores = 2.0 * num_tokens * sequence_length * query  # half of each score matrix, twice
    return flop - feed_forward + scores, feed_forward


def forward_flop(block: BlockLayout, sequences: int, sequence_length: int) -> float:
    """Count the arithmetic of a layer's or a head's forward pass."""
    return sum(segment_flop(block, sequences, sequence_length))


def graph_bytes(block: BlockLayout, sequences: int, sequence_length: int) -> tuple[int, ...]:
    """Return what autograd saves of one microbatch in a block besides weights, by segment.

    The tensors that transformers' eager layers save in fp32, fitted to `Block.saving()` for 14 shapes (torch 2.13,
    transformers 5; attention as if its heads were 64 wide).
    """
    token_bytes = ELEMENT_BYTES * sequences * sequence_length
    if block.kind is BlockKind.NORM:
        return (token_bytes * 2 * block.num_elements,)
    if block.kind is not BlockKind.LAYER:
        return ()  # tables take their gradients by hand
    (query, width), (key, _), (ffn, _) = (_shape(block, name) for name in ("q_proj", "k_proj", "gate_proj"))
    attention = 3 * width + 2 * query + 2 * key + query // 64 + 1
    if any("q_norm" in slot.name for slot in block.slots):
        attention += 2 * (query + key)
    return token_bytes * attention, token_bytes * (3 * width + 4 * ffn + 1)


def place_bytes(saved_bytes: int) -> int:
    """Return the size of a place for what a graph has saved, in pieces that begin at aligned addresses."""
    return padded(saved_bytes + MAX_PIECES * ALIGNMENT_BYTES)


def workspace_bytes(block: BlockLayout, num_tokens: int) -> int:
    """Return what a block's backward pass takes on top of the graph.

    In a layer two gradients of the MLP's inside, or one and the largest matrix's before it is added (as torch's
    profiler saw it for 5 shapes); in a head two pieces of logits; in a norm nothing to speak of.
    """
    if block.kind is BlockKind.HEAD:
        rows = block.slots[0].shape[0]
        return 2 * min(LOGIT_BYTES, ELEMENT_BYTES * num_tokens * rows)
    if block.kind is not BlockKind.LAYER:
        return 0
    ffn, width = _shape(block, "gate_proj")
    return ELEMENT_BYTES * ffn * (num_tokens + max(num_tokens, width))


def _drive(machine: Machine) -> Link | None:
    """Return a drive's way to the device: through host memory, one copy after the other in the same thread."""
    if machine.nvme_read_bytes_per_s is None or machine.nvme_write_bytes_per_s is None:
        return None
    return Link(
        in_bytes_per_s=1 / (1 / machine.nvme_read_bytes_per_s + 1 / machine.link_bytes_per_s),
        out_bytes_per_s=1 / (1 / machine.nvme_write_bytes_per_s + 1 / machine.link_bytes_per_s),
    )


def _shape(layer: BlockLayout, name: str) -> tuple[int, int]:
    rows, columns = next(slot.shape for slot in layer.slots if f".{name}.weight" in slot.name)
    return rows, columns
