"""Registering, renewing a pass, beating: the peer's side, against a coordinator that the test plays.

Oracle: what the coordinator was asked, in order. The seam is `Link`: only its calls are answered here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peer import coordination
from peer.coordination import Condition, Registration, keep_beating
from peer.link import Link
from peer.reports import PER_BEAT, ReportQueue
from peer.settings import PeerSettings
from protocol.access import revoke
from protocol.control import Beat, BeatReply, Capability, ClosingReport, PeerState, Register, Welcome
from protocol.errors import ClockError, IncompatibleError, RefusedError, UnreachableError
from protocol.ids import RunId, StageId
from protocol.invite import Invite
from protocol.manifest import MANIFEST_CONTEXT
from protocol.records import admit
from protocol.signing import Signed, SigningKey, seal
from tests.protocol.manifests import KEY, manifest

RUN = manifest()
ME = SigningKey.generate()
HOUR_S = 3600
CAPABILITY = Capability(device="cpu", threads=1, memory_bytes=1, software="test")
TRAINING = Condition(PeerState.TRAINING, "", ())
INVITE = Invite(run=RUN.run_id, coordinator=KEY.peer_id, addresses=("/ip4/127.0.0.1/tcp/1",), token=None)
REPLY = BeatReply(acknowledged=0, stages=(StageId(1),), charters=())


class Coordinator:
    """Answers what it is asked from a script; everybody is welcome."""

    def __init__(self, *, age_s: float = 0.0, answers: list[BeatReply | Exception] | None = None) -> None:
        self.asked: list[Register | Beat] = []
        self.age_s = age_s
        self.answers = answers or []
        self.coordinator = KEY.peer_id
        self.coordinator_addresses = ()
        self.process = 1
        self.calls = self
        self.node = SimpleNamespace(addresses=self._addresses)
        self.learnt: list[Signed] = []
        self.passes = SimpleNamespace(own=None, learn=self.learnt.append)
        self.door = SimpleNamespace(number=7)
        self.on_beat: Callable[[], None] = lambda: None
        self.reply: Callable[[Beat], BeatReply] = lambda beat: REPLY
        self.manifest_key = KEY
        self.clock_ahead_s = 0.0
        self.refusal: Exception | None = None

    async def _addresses(self) -> tuple[str, ...]:
        return ()

    async def call(self, to: object, message: Register | Beat, answer_type: type, *, introduced: bool = True) -> Any:
        self.asked.append(message)
        assert introduced is isinstance(message, Beat), "who registers has no pass yet, or a better one soon"
        if isinstance(message, Register):
            if self.refusal is not None:
                raise self.refusal
            return self._welcome()
        self.on_beat()
        answer = self.answers.pop(0) if self.answers else self.reply(message)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _welcome(self) -> Welcome:
        issued_s = int(time.time() - self.age_s)
        return Welcome(
            manifest=seal(self.manifest_key, MANIFEST_CONTEXT, RUN),
            admission=admit(KEY, run=RUN.run_id, peer=ME.peer_id, name="a", issued_s=issued_s, valid_hours=1),
            stages=(StageId(1),),
            charters=(),
            clock_s=time.time() + self.clock_ahead_s,
        )

    @property
    def kinds(self) -> list[str]:
        return [type(message).__name__ for message in self.asked]


def registration(coordinator: Coordinator) -> Registration:
    return Registration(cast(Link, coordinator), INVITE, PeerSettings(), capability=CAPABILITY)


async def beat_times(
    coordinator: Coordinator, number: int, registered: Registration, *, reports: ReportQueue | None = None
) -> list[BeatReply]:
    """Beat until `number` beats were sent, and return what was taken over."""
    replies: list[BeatReply] = []
    enough = asyncio.Event()
    sent = 0

    def count() -> None:
        nonlocal sent
        sent += 1
        if sent >= number:
            enough.set()

    coordinator.on_beat = count
    beating = asyncio.create_task(
        keep_beating(
            cast(Link, coordinator),
            registered,
            condition=lambda: TRAINING,
            reports=reports or ReportQueue(),
            on_reply=replies.append,
        )
    )
    waiting = asyncio.create_task(enough.wait())
    await asyncio.wait({beating, waiting}, timeout=10.0, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.sleep(0)
    waiting.cancel()
    if beating.done():
        beating.result()
    beating.cancel()
    return replies


@pytest.fixture(autouse=True)
def _quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordination, "BEAT_S", 0.001)


async def test_every_tenure_has_a_larger_session_and_a_renewal_none() -> None:
    coordinator = Coordinator()
    registered = registration(coordinator)
    await registered.enter()
    await registered.renew(hosting=(StageId(1),))
    await registered.enter(hosting=(StageId(0),))
    asked = [message for message in coordinator.asked if isinstance(message, Register)]
    assert asked[0].session == asked[1].session < asked[2].session
    assert [message.hosting for message in asked] == [(), (1,), (0,)]


async def test_a_process_that_starts_later_has_a_larger_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the wall clock; a peer whose clock is off by seconds is not let in at all."""
    first, second = registration(Coordinator()), registration(Coordinator())
    await first.enter()
    monkeypatch.setattr(time, "time_ns", lambda: (first.session + 1) * 1_000_000)
    await second.enter()
    assert second.session > first.session


async def test_a_pass_is_renewed_when_half_of_it_is_over() -> None:
    old = Coordinator(age_s=HOUR_S / 2 + 1)
    registered = registration(old)
    await registered.enter()
    assert registered.is_due
    assert old.passes.own == registered.welcome.admission, "it is what others are shown"
    before = old.passes.own
    old.age_s = 0.0
    await beat_times(old, 3, registered)
    assert old.passes.own == registered.welcome.admission != before
    assert old.kinds[:5] == ["Register", "Register", "Beat", "Beat", "Beat"]
    assert not registered.is_due


async def test_a_newer_revocation_list_is_taken_over_with_the_reply() -> None:
    """Oracle: the number that the beat has named, and what the door hears of."""
    signed = revoke(KEY, run=RunId("ab" * 16), number=8, issued_s=1.0, peers=())
    coordinator = Coordinator(answers=[REPLY.model_copy(update={"revoked": signed})])
    registered = registration(coordinator)
    await registered.enter()
    await beat_times(coordinator, 2, registered)
    assert coordinator.learnt == [signed]
    assert [asked.revocations for asked in coordinator.asked if isinstance(asked, Beat)][:2] == [7, 7]


async def test_a_coordinator_that_has_forgotten_us_is_told_once_more() -> None:
    coordinator = Coordinator(answers=[RefusedError("who are you?")])
    registered = registration(coordinator)
    await registered.enter()
    assert REPLY in await beat_times(coordinator, 3, registered)
    assert coordinator.kinds[:4] == ["Register", "Beat", "Register", "Beat"]
    again = coordinator.asked[2]
    assert isinstance(again, Register)
    assert again.hosting == (1,)


async def test_who_is_refused_twice_is_not_wanted() -> None:
    coordinator = Coordinator(answers=[RefusedError("who are you?"), RefusedError("go away")])
    registered = registration(coordinator)
    await registered.enter()
    with pytest.raises(RefusedError, match="go away"):
        await beat_times(coordinator, 3, registered)


async def test_a_silent_coordinator_is_asked_again() -> None:
    coordinator = Coordinator(answers=[UnreachableError("nobody"), UnreachableError("nobody")])
    registered = registration(coordinator)
    await registered.enter()
    assert REPLY in await beat_times(coordinator, 4, registered)


async def test_what_has_piled_up_while_the_coordinator_was_away_is_handed_in_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also while more comes in. Oracle: beats that each take what one holds; at the usual pace, which is an hour here,
    there would be one.
    """
    monkeypatch.setattr(coordination, "BEAT_S", 3600.0)
    monkeypatch.setattr(coordination, "CATCH_UP_S", 0.0)
    coordinator, reports = Coordinator(), ReportQueue()
    report = ClosingReport(closing=Signed(payload=b"", signer=ME.peer_id, signature=bytes(64)))
    for _ in range(3 * PER_BEAT + 1):
        reports.add(report)

    def acknowledge(message: Beat) -> BeatReply:
        for _ in range(8):
            reports.add(report)
        return REPLY.model_copy(update={"acknowledged": message.reports[-1].sequence})

    coordinator.reply = acknowledge
    registered = registration(coordinator)
    await registered.enter()
    await beat_times(coordinator, 4, registered, reports=reports)
    assert coordinator.kinds == ["Register", "Beat", "Beat", "Beat", "Beat"]
    assert len(reports) == 8, "what has come up during the last one"


async def test_a_coordinator_that_takes_nothing_is_not_hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disk may be full. Oracle: one beat in an hour."""
    monkeypatch.setattr(coordination, "BEAT_S", 3600.0)
    monkeypatch.setattr(coordination, "CATCH_UP_S", 0.0)
    coordinator, reports = Coordinator(), ReportQueue()
    for _ in range(3 * PER_BEAT):
        reports.add(ClosingReport(closing=Signed(payload=b"", signer=ME.peer_id, signature=bytes(64))))
    coordinator.reply = lambda message: REPLY.model_copy(update={"acknowledged": message.reports[-2].sequence})
    registered = registration(coordinator)
    await registered.enter()
    await beat_times(coordinator, 1, registered, reports=reports)
    await asyncio.sleep(0.1)
    assert coordinator.kinds == ["Register", "Beat"]


async def test_a_manifest_that_another_key_signed_is_not_trusted() -> None:
    coordinator = Coordinator()
    coordinator.manifest_key = SigningKey.generate()
    with pytest.raises(RefusedError, match="cannot be trusted"):
        await registration(coordinator).enter()


async def test_a_clock_that_is_off_is_refused_with_its_difference() -> None:
    coordinator = Coordinator()
    coordinator.clock_ahead_s = -5.0
    with pytest.raises(ClockError, match="5 s ahead"):
        await registration(coordinator).enter()


async def test_a_coordinator_that_serves_another_version_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordination, "REGISTER_PAUSE_S", 0.0)
    coordinator = Coordinator()
    coordinator.refusal = UnreachableError("protocols not supported", is_deaf=True)
    with pytest.raises(IncompatibleError, match="does not speak protocol"):
        await registration(coordinator).enter()
    coordinator.refusal = UnreachableError("silence")
    with pytest.raises(UnreachableError, match="does not answer"):
        await registration(coordinator).enter()
