"""Which stages a peer is asked to host. Pure: from counts alone, no clock, no sockets.

Owns: the choice for a joiner, and who moves when a stage has nobody. Must not know: how a peer loads a
stage, or charters. Called by `registry.py` at every registration and by `charters.py` when a stage is empty.

The rule is coverage: an empty stage first, then the one with the fewest replicas. Measured throughput
does not enter yet; a peer hosts consecutive stages only, so that its tasks run through its span.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from protocol.errors import RefusedError
from protocol.ids import PeerId, StageId


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One live peer as placement sees it."""

    peer: PeerId
    stages: tuple[StageId, ...]
    """What it is asked to host, loaded or not."""
    ready: frozenset[StageId] = frozenset()
    """What it can work on now."""
    pinned: bool = False
    """Its volunteer chose the stages: it is never moved."""
    joined_s: float = 0.0


def coverage(hosts: Iterable[Host], num_stages: int) -> list[int]:
    """Count the live peers that are asked to host each stage."""
    counts = [0] * num_stages
    for host in hosts:
        for stage in host.stages:
            counts[stage] += 1
    return counts


def place(
    wanted: Sequence[StageId],
    hosts: Iterable[Host],
    *,
    num_stages: int,
    span: int = 1,
    kept: Collection[StageId] = (),
) -> tuple[StageId, ...]:
    """Choose the stages of a joiner: what it wants, else the least covered run of `span` stages.

    Among equals those win whose state the joiner has kept on its disk, then the first ones, so that an empty
    swarm fills from the embedding upwards. Raises `RefusedError` for wishes that cannot be hosted.
    """
    if wanted:
        return _checked(wanted, num_stages)
    counts = coverage(hosts, num_stages)
    length = min(span, num_stages)
    # the emptiest stage decides first, so a window is judged by its sorted counts
    starts = range(num_stages - length + 1)
    best = min(
        starts,
        key=lambda start: (
            sorted(counts[start : start + length]),
            -sum(start <= stage < start + length for stage in set(kept)),
            start,
        ),
    )
    return tuple(StageId(stage) for stage in range(best, best + length))


def choose_mover(hosts: Iterable[Host], empty: StageId, *, num_stages: int) -> PeerId | None:
    """Choose who should move to a stage that has nobody: from the best covered stage, the newest peer there.

    Only peers that host one stage move, only from a stage where at least one other replica is ready, and
    never against their volunteer's wish. None if nobody can be spared.
    """
    hosts = list(hosts)
    movable = [host for host in hosts if len(host.stages) == 1 and not host.pinned and host.stages[0] != empty]
    ready = _ready_counts(hosts, num_stages)
    spared = [host for host in movable if ready[host.stages[0]] - (host.stages[0] in host.ready) >= 1]
    if not spared:
        return None
    counts = coverage(hosts, num_stages)
    best = max(spared, key=lambda host: (counts[host.stages[0]], -len(host.ready), host.joined_s, host.peer))
    return best.peer


def _ready_counts(hosts: Iterable[Host], num_stages: int) -> list[int]:
    counts = [0] * num_stages
    for host in hosts:
        for stage in host.ready & set(host.stages):
            counts[stage] += 1
    return counts


def _checked(wanted: Sequence[StageId], num_stages: int) -> tuple[StageId, ...]:
    stages = tuple(sorted(set(wanted)))
    if stages[-1] >= num_stages or stages[0] < 0:
        raise RefusedError(f"stage {stages[-1]} does not exist: this run has stages 0 to {num_stages - 1}.")
    if stages != tuple(range(stages[0], stages[-1] + 1)):
        raise RefusedError(f"a peer hosts consecutive stages, not {', '.join(map(str, stages))}.")
    return stages
