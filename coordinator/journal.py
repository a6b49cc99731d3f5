"""What an organiser should hear of: events that are kept, and notes on what is wrong right now.

Owns: writing events without ever failing the caller, and the set of current notes. Must not know: who reads
them (`status.py` shows both). A full disk must not stop training, so an event that cannot be written only
becomes a note.
"""

from __future__ import annotations

import structlog

from coordinator.clock import Clock
from coordinator.store import history
from coordinator.store.database import Database
from protocol.errors import StorageError
from protocol.ids import PeerId

log = structlog.get_logger()

MAX_DETAIL_CHARS = 500
DISK_NOTE = "disk"


class Journal:
    """Takes events and notes from all services."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._notes: dict[str, str] = {}

    @property
    def notes(self) -> dict[str, str]:
        """What is wrong right now, by topic."""
        return dict(self._notes)

    async def event(self, kind: str, peer: PeerId | None = None, detail: str = "") -> None:
        """Keep an event, named `noun.verb`."""
        log.info(kind, peer=peer, detail=detail)
        event = history.Event(at_s=self._clock.wall(), kind=kind, peer=peer, detail=detail[:MAX_DETAIL_CHARS])
        try:
            await self._database.run(history.add_event, event)
        except StorageError as error:
            self.note(DISK_NOTE, str(error))

    def note(self, topic: str, text: str) -> None:
        """Say what is wrong with `topic` until it is cleared."""
        if self._notes.get(topic) != text:
            log.warning("note.set", topic=topic, text=text)
        self._notes[topic] = text[:MAX_DETAIL_CHARS]

    def clear(self, topic: str) -> None:
        """`topic` is fine again."""
        if self._notes.pop(topic, None) is not None:
            log.info("note.cleared", topic=topic)
