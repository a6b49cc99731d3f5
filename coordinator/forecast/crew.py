"""How long the replicas of a stage take for a round's microbatches, each at its own speed. Pure.

Owns: `Load` (what a microbatch takes of a peer's card and of its link) and the shortest time for a whole round. Must
not know: models, bytes, what comes before and behind.

A peer computes, sends and receives at the same time, so it is as fast as the slowest of the three. Microbatches go to
whoever is free first, and each is worked on by one replica: 9 of them take two equal replicas as long as 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

NUM_HALVINGS = 80  # of an interval, until it is as short as floats can tell
SLACK = 1e-9  # of one microbatch: a time that was computed from a count allows for that count


class Limit(StrEnum):
    """What a round waits for."""

    COMPUTE = "compute"
    MEMORY = "memory"
    """State that comes from host memory or a drive."""
    UPLOAD = "upload"
    DOWNLOAD = "download"
    PIPELINE = "pipeline"
    """The way of the first microbatch through all stages and back, while there is not enough to do on the way."""
    BOUNDARY = "boundary"
    """Ballots, the optimizer's step, and the hash of the new state, between two rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Seconds that one replica needs."""

    compute_s: float
    """Per microbatch, and longer than 0."""
    upload_s: float = 0.0
    download_s: float = 0.0
    round_upload_s: float = 0.0
    """Per round, for what travels beside microbatches."""
    round_download_s: float = 0.0
    streams: bool = False
    """Computing takes as long as it does because of what has to come to the device."""

    @property
    def service_s(self) -> float:
        """Seconds from one microbatch to the next one, without anything beside them."""
        return max(self.compute_s, self.upload_s, self.download_s)

    def finish_s(self, count: int) -> float:
        """Return the seconds for so many microbatches, and for what travels beside them."""
        return max(self._uses(count).values())

    def count_within(self, seconds: float) -> int:
        """Return how many microbatches end within so many seconds."""
        left = (
            (seconds, self.compute_s),
            (seconds - self.round_upload_s, self.upload_s),
            (seconds - self.round_download_s, self.download_s),
        )
        if min(have_s for have_s, _ in left) < 0:
            return 0
        return math.floor(min(have_s / each_s for have_s, each_s in left if each_s > 0) + SLACK)

    def limit(self, count: float) -> Limit:
        """Tell what takes longest."""
        uses = self._uses(count)
        return max(uses, key=lambda limit: uses[limit])

    def _uses(self, count: float) -> dict[Limit, float]:
        return {
            Limit.MEMORY if self.streams else Limit.COMPUTE: count * self.compute_s,
            Limit.UPLOAD: self.round_upload_s + count * self.upload_s,
            Limit.DOWNLOAD: self.round_download_s + count * self.download_s,
        }


@dataclass(frozen=True, slots=True)
class Finished:
    """A round's microbatches at one stage."""

    seconds: float
    shares: tuple[float, ...]
    """Microbatches of one replica of each kind, on average."""


def finish(crew: Sequence[tuple[Load, int]], count: int) -> Finished:
    """Return the shortest time in which replicas (of each kind so many) get through `count` microbatches."""
    loads = [load for load, _ in crew]
    if len(crew) == 1:
        (load, number), *_ = crew
        return Finished(load.finish_s(-(-count // number)), (count / number,))

    def done_within(seconds: float) -> list[int]:
        return [load.count_within(seconds) for load in loads]

    def total(done: Sequence[int]) -> int:
        return sum(each * number for each, (_, number) in zip(done, crew, strict=True))

    least_s = max(load.finish_s(0) for load in loads)
    most_s = max(least_s, min(load.finish_s(-(-count // number)) for load, number in crew))  # one kind does it alone
    for _ in range(NUM_HALVINGS):
        middle_s = (least_s + most_s) / 2
        if not least_s < middle_s < most_s:
            break
        least_s, most_s = (least_s, middle_s) if total(done_within(middle_s)) >= count else (middle_s, most_s)
    done = done_within(most_s)
    seconds = max(load.finish_s(each) for load, each in zip(loads, done, strict=True))
    return Finished(seconds, tuple(count * each / max(1, total(done)) for each in done))
