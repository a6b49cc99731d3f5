"""Which snapshots peers offer, and which of them add up to a checkpoint. Pure.

Owns: remembering offers, and the vote between replicas of a stage. Must not know: how files are fetched
(`checkpoints.py`) or who is trusted for what else.

A checkpoint is complete at a round when every stage has a snapshot that starts it. Replicas of a stage should
offer equal files of one version and lineage; where they do not, what most of them offer wins, then the newer
version, then the lower lineage and digest, and the others are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from protocol.control import Snapshot
from protocol.ids import PeerId, RoundId, StageId

REMEMBERED = 2  # of each peer and stage: that is how many a peer keeps
Parts = frozenset[str]
PARTS: Parts = frozenset({"weights", "optimizer"})


_Contents = tuple[int, bytes, tuple[tuple[str, int, bytes], ...]]
"""What replicas have to agree about; the newer version is the lesser."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What the replicas of one stage offer for one round."""

    snapshot: Snapshot
    sources: tuple[PeerId, ...]
    dissenters: tuple[PeerId, ...]


class Offers:
    """Snapshots by peer and stage, the newest ones of each."""

    def __init__(self, *, num_stages: int, last_round: RoundId | None = None, parts: Parts = PARTS) -> None:
        self._num_stages = num_stages
        self._last_round = last_round
        self._parts = parts
        self._offers: dict[tuple[PeerId, StageId], dict[RoundId, Snapshot]] = {}
        self._denied: set[tuple[PeerId, StageId, RoundId]] = set()

    def learn(self, peer: PeerId, snapshot: Snapshot) -> None:
        """Take an offer over, unless it cannot be one: a part is missing or there twice, or it counts wrongly.

        Nor is one that was denied.
        """
        is_whole = sorted(file.part for file in snapshot.files) == sorted(self._parts)
        is_beyond = self._last_round is not None and snapshot.round > self._last_round
        is_denied = (peer, snapshot.stage, snapshot.round) in self._denied
        if is_denied or is_beyond or not is_whole or not 0 <= snapshot.version <= snapshot.round:
            return
        known = self._offers.setdefault((peer, snapshot.stage), {})
        known[snapshot.round] = snapshot
        while len(known) > REMEMBERED:
            del known[min(known)]

    def keep_only(self, peers: Iterable[PeerId]) -> None:
        """Forget what everybody else has offered."""
        kept = set(peers)
        for key in [key for key in self._offers if key[0] not in kept]:
            del self._offers[key]
        self._denied = {entry for entry in self._denied if entry[0] in kept}

    def deny(self, peer: PeerId, stage: StageId, round_id: RoundId) -> None:
        """Forget one offer that turned out to be none, however often it is repeated."""
        self._denied.add((peer, stage, round_id))
        self._offers.get((peer, stage), {}).pop(round_id, None)

    def drop(self, is_given_up: Callable[[Snapshot], bool]) -> None:
        """Forget offers of states that do not go on."""
        for known in self._offers.values():
            for round_id in [each for each, snapshot in known.items() if is_given_up(snapshot)]:
                del known[round_id]

    def newest_complete(self, *, after: int) -> RoundId | None:
        """Return the newest round after `after` for which every stage is offered, or None."""
        rounds: dict[RoundId, set[StageId]] = {}
        for (_, stage), known in self._offers.items():
            for round_id in known:
                rounds.setdefault(round_id, set()).add(stage)
        complete = [
            round_id for round_id, stages in rounds.items() if len(stages) == self._num_stages and round_id > after
        ]
        return max(complete, default=None)

    def out_of_step(self, *, after: int) -> tuple[tuple[PeerId, StageId], ...]:
        """Return who should be asked again when every stage offers something after `after`, but no common round.

        Peers speak at different moments, so that short rounds can pass each other by for ever.
        """
        newer = [key for key, known in self._offers.items() if max(known, default=-1) > after]
        covered = {stage for _, stage in newer}
        return tuple(newer) if len(covered) == self._num_stages and self.newest_complete(after=after) is None else ()

    def agreements(self, round_id: RoundId) -> Mapping[StageId, Agreement]:
        """Settle what counts for every stage that is offered at a round."""
        stages = sorted({stage for (_, stage), known in self._offers.items() if round_id in known})
        return {stage: self._settle(stage, round_id) for stage in stages}

    def _settle(self, stage: StageId, round_id: RoundId) -> Agreement:
        offered: dict[_Contents, list[PeerId]] = {}
        for (peer, at), known in self._offers.items():
            if at == stage and round_id in known:
                offered.setdefault(_contents(known[round_id]), []).append(peer)
        best = min(offered, key=lambda each: (-len(offered[each]), each))
        return Agreement(
            snapshot=self._offers[offered[best][0], stage][round_id],
            sources=tuple(sorted(offered[best])),
            dissenters=tuple(sorted(peer for each, peers in offered.items() if each != best for peer in peers)),
        )


def _contents(snapshot: Snapshot) -> _Contents:
    files = tuple(sorted((file.part, file.num_bytes, bytes(file.digest)) for file in snapshot.files))
    return -snapshot.version, bytes(snapshot.lineage), files
