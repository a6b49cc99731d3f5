"""Two processes that go on under one key: noticed by who speaks after whom. Pure.

Owns: what counts as two at once. Must not know: sockets, bans, what was said. `registry.py` tells it of every word that
a peer says, and freezes the identity when it answers yes.

A process draws a number when it starts. One that is restarted, here or on another machine, is heard with a new number,
and the old number never again, but for what was still under way. Two at once take turns: each is heard *again* after
the other, over and over. Addresses say nothing: one process may have several, and changes them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from protocol.ids import PeerId

TURNS = 3  # that one process has taken up again
SPREAD_S = 30.0  # from the first to the last of them: what a dead process had under way comes within a call's 10 s
WINDOW_S = 100.0  # in which they lie; a frozen peer should be frozen within two minutes
MAX_PROCESSES = 50  # within a window: one that is restarted takes seconds to start


@dataclass(slots=True)
class _Process:
    heard_s: float
    turns_s: deque[float] = field(default_factory=deque)
    """When it was heard again after another one, at most once a second."""


@dataclass(slots=True)
class _Voice:
    speaker: int
    processes: dict[int, _Process]


class Doubles:
    """What was heard from whom lately. Memory only: after a restart of ours, two at once are noticed anew."""

    def __init__(self) -> None:
        self._voices: dict[PeerId, _Voice] = {}

    def hear(self, peer: PeerId, process: int, *, now_s: float) -> bool:
        """Take note that a process spoke for a peer; tell whether two of them do."""
        voice = self._voices.get(peer)
        if voice is None:
            self._voices[peer] = _Voice(process, {process: _Process(now_s)})
            return False
        known = voice.processes.get(process)
        if voice.speaker == process and known is not None:  # the usual: nothing to look for
            known.heard_s = now_s
            return False
        voice.speaker = process
        for number in [n for n, other in voice.processes.items() if now_s - other.heard_s > WINDOW_S]:
            del voice.processes[number]
        if known is None or process not in voice.processes:
            voice.processes[process] = _Process(now_s)
            return len(voice.processes) > MAX_PROCESSES
        known.heard_s = now_s
        if not known.turns_s or now_s - known.turns_s[-1] >= 1.0:
            known.turns_s.append(now_s)
        while now_s - known.turns_s[0] > WINDOW_S:
            known.turns_s.popleft()
        return len(known.turns_s) >= TURNS and known.turns_s[-1] - known.turns_s[0] >= SPREAD_S

    def forget(self, peer: PeerId) -> None:
        """Begin anew with a peer: it was frozen, or has gone."""
        self._voices.pop(peer, None)
