"""What this peer says of its hops, until the round is over and it signs it.

Owns: the hops of the open rounds as we saw them, from both ends. Must not know: how windows travel
(`peer/reports.py` carries them to the coordinator), or what they are worth.

A hop that we answered is noted once the whole answer is sent, one that we opened once its answer is here and its
signed path was checked. So an honest caller never vouches for a hop of which an honest callee knows nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from peer.tasks import Body, Outcome, TaskId
from protocol.batches import TaskKind
from protocol.hops import PathEntry
from protocol.ids import PeerId, RoundId, RunId, StageId
from protocol.receipts import Hop, draw_windows, shortened
from protocol.signing import Signed, SigningKey

MAX_HOPS_NOTED = 1 << 19  # in one round, 200 bytes each here; no peer answers more often


@dataclass(slots=True)
class _Notes:
    sent: dict[Hop, None] = field(default_factory=dict)
    served: dict[Hop, None] = field(default_factory=dict)


class ReceiptBook:
    """Receipts of one tenure."""

    def __init__(self, run: RunId, key: SigningKey, *, session: int) -> None:
        self._run = run
        self._key = key
        self._session = session
        self._notes: defaultdict[RoundId, _Notes] = defaultdict(_Notes)
        self._closed: RoundId | None = None
        """The newest round whose windows are signed: what comes later for it would contradict them."""

    def note(self, task: TaskId, caller: PeerId, callee: PeerId, stage: StageId, body: Body, outcome: Outcome) -> None:
        """Note a hop with us at one end, as its signed path describes it. Said twice it counts once."""
        is_late = self._closed is not None and task.round <= self._closed
        if task.kind is not TaskKind.TRAIN or caller == callee or is_late:
            return
        entry = PathEntry.from_bytes(outcome.path[0].payload)
        hop = Hop(
            number=task.number,
            caller=caller,
            callee=callee,
            first_stage=stage,
            num_stages=len(entry.stages),
            target_tokens=outcome.target_tokens,
            given=shortened(body.digest),
            returned=shortened(outcome.gradient_digest),
            version=entry.version,
            local_step=entry.local_step,
            caller_step=body.local_step,
        )
        notes = self._notes[task.round]
        if len(notes.sent) + len(notes.served) < MAX_HOPS_NOTED:
            (notes.sent if caller == self._key.peer_id else notes.served)[hop] = None

    def close(self, round_id: RoundId) -> list[Signed]:
        """Sign what we noted of this round and all before; it is closed then."""
        due = sorted(each for each in self._notes if each <= round_id)
        self._closed = round_id if self._closed is None else max(round_id, self._closed)
        windows: list[Signed] = []
        for each in due:
            notes = self._notes.pop(each)
            windows += draw_windows(
                self._key,
                run=self._run,
                session=self._session,
                round_id=each,
                sent=notes.sent,
                served=notes.served,
            )
        return windows

    def close_all(self) -> list[Signed]:
        """Sign what is left when the tenure ends."""
        return self.close(max(self._notes)) if self._notes else []
