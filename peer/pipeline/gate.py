"""Which round each hosted stage is open for.

Owns: the rule by which a task is let in: same run, hosted stage, same round, same version and lineage,
and not after the stage's contribution was frozen. Must not know: tensors, streams, why a round ended.
The rounds driver opens and freezes; the hop server and the feeder ask.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, defaultdict
from dataclasses import dataclass

from protocol.hops import OpenTask, RefusalCode, Refused
from protocol.ids import Lineage, RoundId, RunId, StageId, Version
from protocol.wire import PROTOCOL_VERSION

AHEAD_HOLD_S = 3.0  # a caller that is a round ahead waits here instead of polling; our commit is on its way

MAX_ROUNDS_KNOWN = 1024  # of all hosted stages together


@dataclass(slots=True)
class Opening:
    """One time at which a stage was opened. A round may be opened again: from a new lineage, with empty sums."""

    round: RoundId
    version: Version
    lineage: Lineage
    opened_s: float
    is_open: bool = True


class Gate:
    """Lets tasks in, or says why not."""

    def __init__(self, *, run: RunId) -> None:
        self._run = run
        self._stages: dict[StageId, Opening] = {}
        self._changed = asyncio.Event()
        self._left: set[StageId] = set()
        self._open_s: defaultdict[StageId, float] = defaultdict(float)
        """How long each stage was open, but for the present opening."""
        self._began: OrderedDict[tuple[StageId, RoundId], Version] = OrderedDict()
        self.is_leaving = False
        """The whole span goes."""

    def open(self, stage: StageId, *, round_id: RoundId, version: Version, lineage: Lineage) -> None:
        """Let tasks of `round_id` in."""
        self._close(stage)
        self._stages[stage] = Opening(round_id, version, lineage, time.monotonic())
        self._began[stage, round_id] = version
        while len(self._began) > MAX_ROUNDS_KNOWN:
            self._began.popitem(last=False)
        self._notify()

    def freeze(self, stage: StageId) -> None:
        """Let nothing more of the current round in."""
        self._close(stage)
        self._notify()

    def leave(self, stage: StageId) -> None:
        """Let nothing in any more: this replica goes with the round that it has ended."""
        self._left.add(stage)
        self.freeze(stage)

    def open_s(self, stage: StageId) -> float:
        """Return for how many seconds a stage was open, all its openings together."""
        known = self._stages.get(stage)
        present_s = time.monotonic() - known.opened_s if known is not None and known.is_open else 0.0
        return self._open_s[stage] + present_s

    def version_of(self, stage: StageId) -> Version:
        """Return a hosted stage's version (0 before it has begun)."""
        known = self._stages.get(stage)
        return Version(0) if known is None else known.version

    def version_at(self, stage: StageId, round_id: RoundId) -> Version | None:
        """Return the version with which a hosted stage began a round, if that was lately."""
        return self._began.get((stage, round_id))

    def forget(self, stage: StageId) -> None:
        """Take nothing for known of a stage's rounds any more."""
        self._stages.pop(stage, None)
        for key in [key for key in self._began if key[0] == stage]:
            del self._began[key]

    def opening(self, stage: StageId) -> Opening | None:
        """Return a hosted stage's newest opening, which may be over."""
        return self._stages.get(stage)

    async def wait_open(self, stage: StageId) -> Opening:
        """Wait until `stage` is open, and return the opening; it says so itself when it is over."""
        while True:
            known = self._stages.get(stage)
            if known is not None and known.is_open:
                return known
            await self._changed.wait()

    async def wait_over(self, opening: Opening) -> None:
        """Wait until work that was begun in `opening` no longer counts."""
        while opening.is_open:
            await self._changed.wait()

    async def admit(self, header: OpenTask) -> Refused | None:
        """Return None if the task may enter, or the refusal. Holds a caller that is a little ahead."""
        refusal = self._judge(header)
        if refusal is None or refusal.code is not RefusalCode.AHEAD:
            return refusal
        try:
            async with asyncio.timeout(min(AHEAD_HOLD_S, header.time_left_s)):
                while refusal is not None and refusal.code is RefusalCode.AHEAD:
                    await self._changed.wait()
                    refusal = self._judge(header)
        except TimeoutError:
            return refusal
        return refusal

    def _judge(self, header: OpenTask) -> Refused | None:
        if header.protocol != PROTOCOL_VERSION:
            return Refused(code=RefusalCode.VERSION, detail=f"this peer speaks protocol {PROTOCOL_VERSION}")
        if header.run != self._run:
            return Refused(code=RefusalCode.WRONG_RUN)
        known = self._stages.get(header.stage)
        if known is None:
            return Refused(code=RefusalCode.WRONG_STAGE, detail=f"stage {header.stage} is not hosted here")
        if self.is_leaving or header.stage in self._left:
            return Refused(code=RefusalCode.LEAVING)
        if header.round > known.round:
            return Refused(code=RefusalCode.AHEAD, detail=f"here it is still round {known.round}")
        if header.round < known.round:
            return Refused(code=RefusalCode.BEHIND, detail=f"here it is round {known.round}")
        if not known.is_open:
            return Refused(code=RefusalCode.FROZEN, detail=f"round {known.round} is being averaged")
        if (header.version, header.lineage) != (known.version, known.lineage):
            return Refused(code=RefusalCode.LINEAGE, detail=f"here it is version {known.version}")
        return None

    def _close(self, stage: StageId) -> None:
        known = self._stages.get(stage)
        if known is not None and known.is_open:
            self._open_s[stage] += time.monotonic() - known.opened_s
            known.is_open = False

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
