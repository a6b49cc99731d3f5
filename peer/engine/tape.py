"""What a microbatch's forward pass through a stage has left behind for its backward pass.

Owns: the record. Must not know: who fills it (`passes.py`), how much may be kept (`retention.py`).

Shapes: B sequences, T positions, D model width. Blocks are counted from 0 within the stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from peer.engine.graph import Graph
from peer.memory.arena import Parked
from peer.memory.segments import Segment
from peer.model.loss import Scores


@dataclass(slots=True, eq=False)
class Tape:
    """One microbatch in one stage."""

    inputs: Tensor
    """Tokens (B, T) on the first stage, hidden states (B, T, D) on the others, on the stage's device."""
    labels_BT: Tensor | None = None
    hidden_BTD: Tensor | None = None
    """On the way up the hidden states reached so far, on the way down the gradient by them."""
    entries: dict[Segment, Tensor | Parked] = field(default_factory=dict)
    """The inputs of segments that have to be recomputed: on the device, or parked in another tier.

    A segment behind one that is recomputed needs none.
    """
    graphs: dict[Segment, Graph] = field(default_factory=dict)
    """The graphs of segments that need not be; what one has saved may be parked."""
    scores: Scores | None = None
    """What the head's blocks have said so far, where there are several."""
    normed_BTD: Tensor | None = None
    """The head's input, while its blocks add up the gradient by it."""
    loss_sum: float = 0.0

    @property
    def present_BTD(self) -> Tensor:
        assert self.hidden_BTD is not None, "nothing has been computed for this microbatch yet"
        return self.hidden_BTD

    @property
    def is_forgotten(self) -> bool:
        """Whether nothing of the forward pass is left but its inputs."""
        return not self.entries and not self.graphs

    @property
    def booked_bytes(self) -> int:
        return sum(graph.booked_bytes for graph in self.graphs.values())

    def parked(self) -> list[Parked]:
        """List what is in other tiers."""
        graphs = [graph.parked for graph in self.graphs.values() if graph.parked is not None]
        return graphs + [entry for entry in self.entries.values() if isinstance(entry, Parked)]

    def forget(self) -> None:
        """Drop everything that was computed from the inputs: the weights it was computed with are about to change."""
        self.hidden_BTD = self.normed_BTD = self.scores = None
        self.entries.clear()
        self.graphs.clear()
