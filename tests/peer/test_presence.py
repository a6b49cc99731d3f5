"""What a peer makes of the records of others. The DHT is played, in virtual time. Oracle: the records."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import cast

from peer.app import _take_records
from peer.link import Link
from peer.presence import FIRST_LOOK_S, LOOK_EVERY_S, Presence
from peer.session import Session
from peer.span_parts import SpanParts
from protocol.errors import DeadlineError
from protocol.ids import PeerId, StageId
from protocol.records import ReplicaRecord
from protocol.signing import Signed
from tests.peer.pipeline.virtual import in_virtual_time

FIRST, SECOND = StageId(0), StageId(1)


def record(name: str, wave: int) -> ReplicaRecord:
    return cast(ReplicaRecord, SimpleNamespace(peer=PeerId(name), wave=wave, addresses=(f"/{name}",)))


ANNE, BERT, CARA = record("anne", 1), record("bert", 8), record("cara", 4)


class PlayedLink:
    """A DHT that does not answer for stage 0 the second time."""

    def __init__(self) -> None:
        self.node = self
        self.num_asked = 0
        self.introduced: list[tuple[PeerId, tuple[str, ...]]] = []

    async def replicas(self, stage: StageId) -> tuple[ReplicaRecord, ...]:
        self.num_asked += 1
        if self.num_asked == 3:
            raise DeadlineError("the DHT is slow")
        return (ANNE,) if stage == FIRST else (BERT, CARA)

    async def introduce(self, peer: PeerId, addresses: Iterable[str]) -> None:
        self.introduced.append((peer, tuple(addresses)))


def test_a_look_up_tells_what_could_be_read_and_introduces_everybody() -> None:
    """A stage that could not be read is not among what was found, and nobody takes it for empty."""
    link = PlayedLink()
    found: list[Mapping[StageId, Sequence[ReplicaRecord]]] = []

    async def look_twice() -> None:
        presence = Presence(
            cast(Link, link),
            name="me",
            software="handcar",
            admission=lambda: cast(Signed, None),
            num_stages=2,
            hosted=lambda: (),
            load_s=lambda: 0.0,
            wave=lambda: 1,
            on_found=found.append,
        )
        looking = asyncio.create_task(presence.keep_looking())
        await asyncio.sleep(FIRST_LOOK_S + 1.5 * LOOK_EVERY_S)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)

    in_virtual_time(look_twice())
    assert found == [{FIRST: (ANNE,), SECOND: (BERT, CARA)}, {SECOND: (BERT, CARA)}]
    assert [peer for peer, _ in link.introduced] == ["anne", "bert", "cara", "bert", "cara"]
    assert link.introduced[0] == ("anne", ("/anne",))


def test_session_and_parts_get_what_they_want_of_the_records() -> None:
    """Oracle: who hosts what for the one, and the waves for the other, of the same look-up."""
    heard: list[Mapping[StageId, object]] = []
    found: Mapping[StageId, Sequence[ReplicaRecord]] = {FIRST: (ANNE,), SECOND: (BERT, CARA)}
    tenure, parts = SimpleNamespace(on_found=heard.append), SimpleNamespace(learn_waves=heard.append)
    _take_records(cast(Session, tenure), cast(SpanParts, parts), found)
    assert heard == [
        {FIRST: ("anne",), SECOND: ("bert", "cara")},
        {FIRST: {"anne": 1}, SECOND: {"bert": 8, "cara": 4}},
    ]
