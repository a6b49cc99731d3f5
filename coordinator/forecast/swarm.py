"""What a forecast is asked about: peers, a model cut into stages, and how it is trained. Values, pure.

Owns: `Swarm`, `Peers`, `Model`, `Recipe`. Must not know: where they come from (`question.py`), what follows from them.

Rates of links are megabits (10^6) per second, as they are sold; all other rates are bytes, tokens or operations per
second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from coordinator.forecast.spans import Span, spans_of
from protocol.manifest import AveragingSpec, BatchSpec, KeepingSpec, OptimizerSpec, TimingSpec

BYTES_PER_MEGABIT = 1e6 / 8

DEFAULT_UPLOAD_MBPS = 20.0
DEFAULT_DOWNLOAD_MBPS = 100.0
DEFAULT_PING_MS = 30.0
DEFAULT_TFLOPS = 10.0  # fp32 that is kept up: an RTX 3060 or 4060 (peer/memory/planning/machines.py)
DEFAULT_PCIE_GB_PER_S = 11.0  # PCIe 3.0 x16 from pinned memory, as measured there
DEFAULT_WAVE = 8  # microbatches; what `peer bench plan` chooses for cards of 8 GB differs between 4 and 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """Some peers that are alike."""

    count: int
    upload_mbps: float = DEFAULT_UPLOAD_MBPS
    download_mbps: float = DEFAULT_DOWNLOAD_MBPS
    tflops: float = DEFAULT_TFLOPS
    """10^12 operations per second in fp32 that training reaches, not the peak."""
    stage_seconds: tuple[float, ...] = ()
    """Measured: a microbatch forward and backward, for each stage or once for all. Then `tflops` is not used."""
    device_bytes: int | None = None
    """Of device memory that training may take; None: enough. The same for the host's, for what the device cannot."""
    host_bytes: int | None = None
    pcie_gb_per_s: float = DEFAULT_PCIE_GB_PER_S
    """10^9 bytes per second from host memory to the device."""
    drive_gb_per_s: float | None = None
    """The same from an NVMe drive; None: there is none. It has room for whatever is left."""

    @property
    def upload_bytes_per_s(self) -> float:
        return self.upload_mbps * BYTES_PER_MEGABIT

    @property
    def download_bytes_per_s(self) -> float:
        return self.download_mbps * BYTES_PER_MEGABIT

    def seconds_of(self, stage: int) -> float:
        """Return the measured seconds of a stage."""
        return self.stage_seconds[0 if len(self.stage_seconds) == 1 else stage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Swarm:
    """All peers, and how they work."""

    peers: tuple[Peers, ...]
    """In the order in which they join: a joiner goes to the first of the stages that have the fewest replicas."""
    ping_ms: float = DEFAULT_PING_MS
    """There and back between any two."""
    stages_per_peer: int = 1
    wave: int = DEFAULT_WAVE
    """Microbatches that share one load of a block where the state does not fit the device."""
    recomputes: bool = True
    """Peers have no room for what a forward pass leaves behind, and compute it once more."""
    in_flight: int | None = None
    """Microbatches that each replica of stage 0 keeps under way; None: as peers do by themselves."""
    boundary_s: float | None = None
    """Measured seconds of a round besides microbatches and transfers: ballots, optimizer, hash. None: calculated."""

    @property
    def num_peers(self) -> int:
        return sum(peers.count for peers in self.peers)

    def crews(self, num_spans: int) -> tuple[Mapping[int, int], ...]:
        """Return, for each span, how many of which peers host it (by their index): as `coordinator/placement.py`."""
        crews: list[dict[int, int]] = [{} for _ in range(num_spans)]
        position = 0
        for index, peers in enumerate(self.peers):
            each, more = divmod(peers.count, num_spans)
            for offset in range(num_spans):
                count = each + (offset < more)
                if count:
                    crews[(position + offset) % num_spans][index] = count
            position += more
        return tuple(crews)


@dataclass(frozen=True)
class Model:
    """A model (a Hugging Face config whose head is its own), and into how many stages it is cut."""

    config: Mapping[str, Any]
    num_stages: int

    def spans(self, stages_per_peer: int) -> tuple[Span, ...]:
        """Return what one peer after the other hosts."""
        stages = self._stages
        return tuple(
            Span.of(stages[start : start + stages_per_peer]) for start in range(0, self.num_stages, stages_per_peer)
        )

    @property
    def num_parameters(self) -> int:
        return sum(stage.num_parameters for stage in self._stages)

    @property
    def width(self) -> int:
        """Numbers per token that go from one stage to the next."""
        width: int = self.config["hidden_size"]
        return width

    @cached_property
    def _stages(self) -> Sequence[Span]:
        return spans_of(self.config, self.num_stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How it is trained: the manifest's sections."""

    batch: BatchSpec
    optimizer: OptimizerSpec
    averaging: AveragingSpec
    timing: TimingSpec
    keeping: KeepingSpec
