"""What a stage's driver does with its queue. The machine and everything around it are played.

Oracle: the events that reach the machine, and the steps that reach the engine.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peer.averaging import driver, machine_clock
from peer.averaging.absorb import Update
from peer.averaging.driver import MAX_INBOX, Hooks, StageDriver, membership_of
from peer.averaging.reduce import Reduced, ReduceError, ReduceGroup, Shards
from peer.memory.disk.wear import WriteBudgetSpent
from peer.pipeline.gate import Gate
from peer.reports import ReportQueue
from protocol.errors import BusyError, LocalFault, PeerFault, StorageError, UnreachableError
from protocol.history import LogRequest
from protocol.ids import Digest, Lineage, PeerId, RoundId, RunId, StageId, Version, digest
from protocol.manifest import AveragingMode
from protocol.rounds import events
from protocol.rounds.messages import Contribution, Hello
from protocol.signing import Signed

STAGE = StageId(1)
ANNE, BERT = PeerId("anne"), PeerId("bert")
BEAT_S = 0.01


class Machine:
    """Notes what it is told and when; may be asked for actions."""

    chain = applied = None

    def __init__(self) -> None:
        self.seen: list[events.Event] = []
        self.seen_s: list[float] = []
        self.answers: list[list[Any]] = []

    def handle(self, event: events.Event, now_s: float) -> list[Any]:
        self.seen.append(event)
        self.seen_s.append(now_s)
        return self.answers.pop(0) if self.answers else []

    def has_seen(self, kind: type[Any]) -> bool:
        return any(isinstance(event, kind) for event in self.seen)


@dataclass
class Engine:
    version: int = 5
    shards: tuple[Any, ...] = ()
    anchored = None

    def due(self, version: Version, round_id: RoundId) -> tuple[int, ...]:
        return ()

    def contribution_shard(self, number: int) -> Any:
        raise AssertionError("there are no shards")

    def contribution_norm(self, shards: tuple[int, ...]) -> float:
        return float(self.version)

    def state_digest(self) -> Digest:
        return digest(str(self.version).encode())


class Sync:
    """Fetches at once, unless it is held up, and absorbs by counting up; nobody has `missing`."""

    def __init__(self, engine: Engine, compute: Compute, *, missing: int) -> None:
        self._engine = engine
        self._compute = compute
        self._missing = missing
        self.found = asyncio.Event()
        self.found.set()
        self.fault: Exception | None = None
        self.data = b"sum"
        self.asked: list[tuple[PeerId, ...]] = []
        self.log: list[str] = []

    def before_replaced(self, commit: Any, update: Update | None) -> None:
        self.log.append(f"replaced, followed by {None if commit is None or update is None else commit.version}")

    async def fetch_update(self, commit: Any, sources: Any) -> Update:
        self.asked.append(tuple(sources))
        if commit.version == self._missing:
            self._missing = 0
            raise UnreachableError("nobody has it")
        await self.found.wait()
        return Update("fp32", self.data, (1,))

    async def absorb(self, commit: Any, update: Update) -> None:
        def step() -> None:
            if commit.version != self._engine.version + 1:
                raise PeerFault("that does not follow")
            if self.fault is not None:
                raise self.fault
            self._engine.version = commit.version
            self.log.append(f"absorbed {commit.version}")

        await self._compute.run(step)

    async def keep(self, commit: Any, signed: Any, update: Update) -> None:
        self.log.append(f"kept {commit.version}")

    async def from_members(self, sources: Any, *, least_generation: int, forgets: bool) -> Any:
        self.forgets = forgets
        if self.fault is not None:
            raise self.fault
        self.log.append(f"resync at {self._engine.version}")
        self.sources = tuple(sources)
        return SimpleNamespace(charter="charter", commits=())


class Compute:
    """As the compute thread: what has begun runs to its end, and it may be busy."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()

    async def run(self, work: Any, **_: object) -> Any:
        async def job() -> Any:
            await self.free.wait()
            return work()

        return await asyncio.shield(asyncio.create_task(job()))

    def submit(self, work: Any, **_: object) -> Any:
        return asyncio.ensure_future(self.run(work))


class History:
    """Notes in which thread it is read, and that a snapshot was taken."""

    def __init__(self, log: list[str]) -> None:
        self.threads: set[threading.Thread] = set()
        self._log = log

    def save_snapshot(self, write: Any, **_: object) -> None:
        self._log.append("snapshot")

    def commit_of(self, version: Version) -> None:
        self.threads.add(threading.current_thread())


class Reduces:
    """Fails in the same way each time, or comes to `b"sum"`."""

    def __init__(self) -> None:
        self.fault: Exception | None = None

    async def reduce(self, group: ReduceGroup, shards: Shards) -> Reduced:
        if self.fault is not None:
            raise self.fault
        return Reduced(
            codec="fp32",
            shard_elements=(),
            data=memoryview(b""),
            digest=digest(b"sum"),
            bytes_sent=0,
            bytes_received=0,
            seconds=0.0,
        )


MANIFEST = SimpleNamespace(
    averaging=SimpleNamespace(codec="fp32", mode=AveragingMode.GRADIENT, fragments=1),
    batch=SimpleNamespace(num_rounds=9),
    keeping=SimpleNamespace(checkpoint_every=9),
    timing=SimpleNamespace(beat_s=4 * BEAT_S, hop_silence_s=1.0, reduce_timeout_s=1.0, round_deadline_s=1.0),
)


class Case:
    def __init__(self, *, missing: int = 0) -> None:
        self.machine = Machine()
        self.engine = Engine()
        self.compute = Compute()
        self.sync = Sync(self.engine, self.compute, missing=missing)
        self.log = self.sync.log
        self.history = History(self.log)
        self.reduces = Reduces()
        self.faults: list[Exception] = []
        self.committed: list[int] = []
        self.forgotten: list[StageId] = []
        self.is_open, self.tokens = False, 0
        self.driver = StageDriver(
            STAGE,
            manifest=cast(Any, MANIFEST),
            machine=cast(Any, self.machine),
            me=PeerId("me"),
            engine=cast(
                Any,
                SimpleNamespace(
                    engines={STAGE: self.engine},
                    open=lambda *_, **__: None,
                    freeze=lambda *_, **__: self._freeze(),
                    is_open=lambda _: self.is_open,
                    note_standing=lambda stage, standing: self.log.append(f"standing {standing.version}"),
                    note_fault=self._note_fault,
                    tokens_per_s=lambda stage: None,
                ),
            ),
            compute=cast(Any, self.compute),
            calls=cast(Any, None),
            reduce=cast(Any, self.reduces),
            sync=cast(Any, self.sync),
            history=cast(Any, self.history),
            gate=cast(
                Any,
                SimpleNamespace(
                    open=lambda *_, **__: self.log.append("open"), freeze=lambda *_: None, open_s=lambda *_: 0.0
                ),
            ),
            view=cast(Any, SimpleNamespace(learn=lambda membership: None, forget=self.forgotten.append)),
            reports=ReportQueue(),
            hooks=Hooks(
                on_freeze=lambda closing: None,
                on_commit=lambda commit, signed: self.committed.append(commit.version),
                sources=lambda: (BERT,),
                on_own_closing=lambda message: None,
                on_lost=lambda: None,
            ),
            beat_s=BEAT_S,
        )
        self.driver._after_step = cast(Any, lambda commit, *_: self._committed(commit.version))  # type: ignore[method-assign]

    def _committed(self, version: int) -> None:
        self.committed.append(version)
        self.log.append(f"told {version}")

    def _freeze(self) -> int:
        if self.is_open:
            self.log.append("frozen")
        self.is_open = False
        return self.tokens

    def _note_fault(self, error: Exception) -> bool:
        self.faults.append(error)
        return isinstance(error, (WriteBudgetSpent, MemoryError))

    async def perform(self, *actions: Any) -> None:
        """Let the machine ask for this at the next event, and wait until it has."""
        self.machine.answers = [list(actions)]
        self.driver.post(events.Tick())
        await until(lambda: not self.machine.answers)


@asynccontextmanager
async def running(case: Case) -> AsyncIterator[None]:
    """Run the driver for as long as the block takes; it must not have failed by then."""
    task = asyncio.create_task(case.driver.run())
    yield
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})


def step(version: int, *contributors: PeerId) -> events.CommitStep:
    """A commit of which only this is looked at."""
    given = tuple(SimpleNamespace(peer=peer, tokens=1, weight=1) for peer in contributors)
    commit = SimpleNamespace(
        version=Version(version), round=RoundId(version), digest=digest(b"sum"), contributors=given
    )
    return cast(events.CommitStep, SimpleNamespace(commit=commit, signed=commit, lineage=Lineage(bytes(32))))


async def until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("that did not happen")


def hello() -> Hello:
    return cast(Hello, SimpleNamespace(stage=STAGE))


async def test_strangers_cannot_fill_the_memory_of_a_stage_that_is_busy() -> None:
    case = Case()
    for _ in range(MAX_INBOX):
        case.driver.receive(ANNE, hello())
    with pytest.raises(BusyError):
        case.driver.receive(ANNE, hello())
    case.driver.post(events.Tick())  # what is our own is never refused
    async with running(case):
        await until(lambda: len(case.machine.seen) > MAX_INBOX)
        case.driver.receive(ANNE, hello())


OPENING = events.OpenRound(
    round=RoundId(1),
    first_round=RoundId(1),
    version=Version(5),
    lineage=Lineage(bytes(32)),
    members=(ANNE,),
    fresh=True,
)


async def test_a_long_step_is_followed_by_one_tick_and_not_by_all_that_were_missed() -> None:
    """Each of them would repeat every message that nobody has acknowledged."""
    case = Case()
    case.machine.answers = [[OPENING]]
    case.compute.free.clear()
    async with running(case):
        await asyncio.sleep(20 * BEAT_S)
        assert len(case.machine.seen) == 1
        case.compute.free.set()
        await until(lambda: len(case.machine.seen) >= 2)
        assert len(case.machine.seen) <= 3
        assert all(isinstance(event, events.Tick) for event in case.machine.seen)


@pytest.mark.parametrize(("beats", "is_sleep"), [(5, False), (20, True)])
async def test_our_own_work_is_no_sleep_unless_others_may_have_given_us_up(
    monkeypatch: pytest.MonkeyPatch, beats: int, is_sleep: bool
) -> None:
    """Three beats without an event are sleep to the machine, and the others' patience is twelve beats.

    Oracle: the time that the machine is told before and after, on a played clock.
    """
    time = SimpleNamespace(now_s=0.0)
    for module in (driver, machine_clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time.now_s))
    case = Case()
    case.machine.answers = [[OPENING]]
    case.compute.free.clear()
    async with running(case):
        await until(lambda: case.machine.seen)
        time.now_s += beats * BEAT_S
        case.compute.free.set()
        await until(lambda: len(case.machine.seen) >= 2)
        before_s, after_s, *_ = case.machine.seen_s
        assert (after_s - before_s > 3 * BEAT_S) is is_sleep


# -- fetching ----------------------------------------------------------------------------------------------


async def test_bytes_that_fit_the_digest_and_nothing_else_are_a_failed_fetch() -> None:
    """A member may commit to nonsense. Oracle: the machine hears of it, and the driver goes on."""
    case = Case()
    case.engine.shards = (SimpleNamespace(num_elements=1000),)
    async with running(case):
        await case.perform(events.Fetch(step(6).commit, (BERT,)))
        await until(lambda: case.machine.has_seen(events.FetchFailed))
        assert not case.machine.has_seen(events.Fetched)


async def test_only_who_is_known_to_host_the_stage_is_asked_for_bytes() -> None:
    """Not whoever sent the message: a stranger could make us wait. Oracle: whom the fetch is given, in order."""
    case = Case(missing=6)
    named = (PeerId("stranger"), ANNE, BERT)
    async with running(case):
        await case.perform(events.Fetch(step(6).commit, named))
        await until(lambda: case.machine.has_seen(events.FetchFailed))
        await case.perform(events.Replay((step(6, ANNE),), named))
        await until(lambda: case.machine.has_seen(events.Applied))
    assert case.sync.asked == [(BERT,), (ANNE, BERT)]


async def test_an_update_that_does_not_follow_is_told_to_the_machine() -> None:
    """It knows how to get to its place again. Oracle: what it hears of a step that follows, and of another."""
    case = Case()
    async with running(case):
        for version, kind in ((6, events.Applied), (9, events.ApplyFailed)):
            case.driver._stage_update(digest(b"sum"), Update("fp32", b"sum", (1,)))
            target = step(version)
            await case.perform(events.Apply(target.commit, target.signed, target.lineage))
            await until(partial(case.machine.has_seen, kind))
            case.driver._staged.clear()
        assert [entry for entry in case.log if "kept" in entry or "absorbed" in entry] == ["absorbed 6", "kept 6"]


# -- what our own machine cannot do for now -------------------------------------------------------------------

SPENT = WriteBudgetSpent("today's writes are spent.", resumes_in_s=60.0)


async def wait_left(case: Case) -> bool:
    """Tell whether the peer may leave at once."""
    try:
        async with asyncio.timeout(0.02):
            await case.driver.wait_left()
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("fault", [SPENT, MemoryError("full")], ids=repr)
@pytest.mark.parametrize("way", ["apply", "replay", "resync"])
async def test_a_step_that_needs_a_pause_ends_nothing_and_is_not_tried_again(way: str, fault: Exception) -> None:
    """Told of a failure, the machine tries again at each tick, and at the third it fetches the whole state.

    Oracle: the engine hears of the fault once, and the machine of nothing; others can have the bytes still.
    """
    case, target = Case(), step(6, ANNE)
    case.sync.fault = fault
    case.driver._stage_update(digest(b"sum"), Update("fp32", b"sum", (1,)))
    actions = {
        "apply": events.Apply(target.commit, target.signed, target.lineage),
        "replay": events.Replay((target,), ()),
        "resync": events.Resync(None, ()),
    }
    async with running(case):
        await case.perform(actions[way])
        await until(lambda: case.faults)
        seen = len(case.machine.seen)
        await until(lambda: len(case.machine.seen) > seen + 2)
        assert not any(case.machine.has_seen(kind) for kind in (events.Applied, events.ApplyFailed, events.Synced))
        assert case.faults == [fault]
        if way != "resync":
            assert case.driver.staged_update(digest(b"sum").hex()) == b"sum"
            assert await wait_left(case), "others have the bytes: nobody need wait for us"


async def test_who_alone_has_the_bytes_does_not_leave_at_once() -> None:
    """Oracle: the way out, which the session waits for."""
    case, target = Case(), step(6, PeerId("me"))
    case.sync.fault = SPENT
    case.driver._stage_update(digest(b"sum"), Update("fp32", b"sum", (1,)))
    async with running(case):
        await case.perform(events.Apply(target.commit, target.signed, target.lineage))
        await until(lambda: case.faults)
        assert not await wait_left(case)


@pytest.mark.parametrize("fault", [StorageError("full disk"), RuntimeError("a bug")], ids=repr)
async def test_what_no_pause_helps_ends_the_peer(fault: Exception) -> None:
    """Oracle: the very error comes out of the driver."""
    case, target = Case(), step(6, ANNE)
    case.sync.fault = fault
    case.driver._stage_update(digest(b"sum"), Update("fp32", b"sum", (1,)))
    case.machine.answers = [[events.Apply(target.commit, target.signed, target.lineage)]]
    with pytest.raises(ExceptionGroup) as caught:
        await case.driver.run()
    assert caught.value.exceptions == (fault,)


SIGNED = Signed(payload=b"closing", signer=ANNE, signature=bytes(64))
REDUCING = events.StartReduce(
    group_id=digest(b"group"),
    round=RoundId(5),
    version=Version(5),
    ballot=1,
    codec="fp32",
    group=(Contribution(peer=PeerId("me"), tokens=1, weight=1), Contribution(peer=ANNE, tokens=4, weight=3)),
    num_asked=2,
)


async def test_a_full_disk_ends_the_peer_and_not_every_reduce_from_now_on() -> None:
    """Oracle: the very error comes out of the driver, and the machine hears of no failed reduce."""
    case = Case()
    case.reduces.fault = StorageError("no room for an update")
    case.machine.answers = [[REDUCING]]
    with pytest.raises(ExceptionGroup) as caught:
        await case.driver.run()
    assert caught.value.exceptions == (case.reduces.fault,)
    assert not case.machine.has_seen(events.ReduceFailed)


@pytest.mark.parametrize("fault", [ReduceError("gone", peer=ANNE), LocalFault("overflow"), SPENT, MemoryError()])
async def test_any_other_reduce_that_fails_is_told_to_the_steward(fault: Exception) -> None:
    """Oracle: the event, and whom it names."""
    case = Case()
    case.reduces.fault = fault
    async with running(case):
        await case.perform(REDUCING)
        await until(lambda: case.machine.has_seen(events.ReduceFailed))
        (failed,) = [event for event in case.machine.seen if isinstance(event, events.ReduceFailed)]
        assert failed.suspect == (ANNE if isinstance(fault, ReduceError) else None)


# -- order ----------------------------------------------------------------------------------------------------


async def test_the_rest_of_the_peer_hears_of_a_step_before_it_is_written_down() -> None:
    """A local checkpoint may take a minute. Oracle: the order."""
    case, target = Case(), step(6)
    case.driver._stage_update(digest(b"sum"), Update("fp32", b"sum", (1,)))
    async with running(case):
        await case.perform(events.Apply(target.commit, target.signed, target.lineage))
        await until(lambda: case.machine.has_seen(events.Applied))
    assert case.log == ["absorbed 6", "kept 6", "told 6", "standing 6"]


async def test_a_snapshot_is_written_before_anybody_is_let_in() -> None:
    """Oracle: the order."""
    case = Case()
    async with running(case):
        await case.perform(replace(OPENING, round=RoundId(9), first_round=RoundId(9)))
        await until(lambda: "open" in case.log)
    assert case.log == ["snapshot", "open"]


async def test_what_was_summed_is_staged_with_its_norm() -> None:
    """Who absorbs it need not look at every number again. Oracle: the norm that the machine is told."""
    case = Case()
    async with running(case):
        await case.perform(REDUCING)
        await until(lambda: case.machine.has_seen(events.ReduceDone))
        (done,) = [event for event in case.machine.seen if isinstance(event, events.ReduceDone)]
        assert case.driver._staged[done.digest].norm == done.norm == 0.0


@pytest.mark.parametrize(
    ("mode", "factors"), [(AveragingMode.GRADIENT, (1.0, 0.75)), (AveragingMode.DILOCO, (0.25, 0.75))]
)
async def test_members_are_summed_and_divided_by_what_counts(mode: AveragingMode, factors: tuple[float, ...]) -> None:
    """Anne claims 4 tokens, of which 3 count. Oracle: by hand."""
    case = Case()
    averaging = SimpleNamespace(codec="fp32", mode=mode, fragments=1)
    case.driver._manifest = cast(Any, SimpleNamespace(averaging=averaging, timing=MANIFEST.timing))
    assert case.driver._group_of(REDUCING).factors == factors
    async with running(case):
        await case.perform(REDUCING)
        await until(lambda: case.machine.has_seen(events.ReduceDone))
        assert case.driver._staged[digest(b"sum")].weights == (1, 3)


@pytest.mark.parametrize(("tokens", "norm"), [(40, 5.0), (0, 5.0)])
async def test_what_is_frozen_is_measured(tokens: int, norm: float) -> None:
    """Also of no tokens: what an earlier average has left out may be there. Oracle: the played engine's norm is its
    version."""
    case = Case()
    case.tokens = tokens
    async with running(case):
        await case.perform(events.Freeze(cast(Any, SimpleNamespace(round=RoundId(5))), SIGNED))
        await until(lambda: case.machine.has_seen(events.Frozen))
        (frozen,) = [event for event in case.machine.seen if isinstance(event, events.Frozen)]
        assert (frozen.tokens, frozen.norm) == (tokens, norm)


@pytest.mark.parametrize("how", ["apply", "replay"])
async def test_what_is_frozen_before_the_step_is_measured_after_it(how: str) -> None:
    """Only then is it a contribution. Oracle: as above, and that nothing else is measured."""
    case, target = Case(), step(6)
    case.tokens = 40
    case.driver._stage_update(digest(b"sum"), Update("fp32", b"sum", (1,)))
    closing = cast(Any, SimpleNamespace(round=RoundId(6)))
    apply = {
        "apply": events.Apply(target.commit, target.signed, target.lineage),
        "replay": events.Replay((target,), ()),
    }[how]
    async with running(case):
        await case.perform(events.Freeze(closing, SIGNED, replaces=True))
        await until(lambda: case.machine.has_seen(events.Frozen))
        await case.perform(apply)
        await until(lambda: case.machine.has_seen(events.Applied))
        await case.perform(events.Replay((step(7),), ()))
        await until(lambda: sum(isinstance(event, events.Applied) for event in case.machine.seen) == 2)
        norms = [event.norm for event in case.machine.seen if isinstance(event, events.Frozen | events.Applied)]
        assert norms == [0.0, 6.0, 7.0], "until the next round is frozen: the machine may have missed the first"


@pytest.mark.parametrize("is_staged", [True, False])
async def test_who_looks_at_contributions_hears_before_one_is_replaced(is_staged: bool) -> None:
    """Oracle: the order of what happens, and the commit whose bytes are here."""
    case, target = Case(), step(6)
    case.is_open = True
    if is_staged:
        case.driver._stage_update(target.commit.digest, Update("fp32", b"sum", (1,)))
    closing = cast(Any, SimpleNamespace(round=RoundId(6)))
    async with running(case):
        await case.perform(events.Freeze(closing, SIGNED, replaces=True, following=target.commit))
        await until(lambda: case.machine.has_seen(events.Frozen))
    assert case.log[:2] == [f"replaced, followed by {6 if is_staged else None}", "frozen"]


def test_norms_are_compared_where_they_are_of_the_same() -> None:
    """Of two nobody can be unusual. Oracle: the group that the reduce gets."""
    case = Case()
    members = tuple(Contribution(peer=PeerId(name), tokens=4, weight=4, norm=2.0) for name in ("me", "b", "c"))
    three = replace(REDUCING, group=members)
    assert case.driver._group_of(three).norms == (2.0, 2.0, 2.0)
    assert case.driver._group_of(three, is_measured=False).norms == ()
    assert case.driver._group_of(REDUCING).norms == ()


# -- replay ------------------------------------------------------------------------------------------------


async def test_a_replay_goes_on_where_the_last_attempt_ended() -> None:
    """Otherwise a source that dies in the middle would cost a download of the whole state."""
    case = Case(missing=7)
    replay = events.Replay((step(6), step(7), step(8)), ())
    async with running(case):
        await case.perform(replay)
        await until(lambda: case.machine.has_seen(events.ApplyFailed))
        await case.perform(replay)
        await until(lambda: case.machine.has_seen(events.Applied))
        assert case.committed == [6, 7, 8]


async def test_a_replay_ends_a_round_of_which_nobody_has_told_us_that_it_is_over() -> None:
    """Local steps of an open round would be taken for what follows the replayed commits.

    And its sum takes the place of the contribution before: nobody knows any more what was given.
    """
    case = Case()
    case.is_open = True
    async with running(case):
        await case.perform(events.Replay((step(6), step(7)), ()))
        await until(lambda: case.machine.has_seen(events.Applied))
        assert [entry for entry in case.log if "frozen" in entry or "absorbed" in entry] == [
            "frozen",
            "absorbed 6",
            "absorbed 7",
        ]
        assert case.log[:3] == ["replaced, followed by None", "frozen", "absorbed 6"]


async def test_a_replay_of_what_is_there_already_is_answered() -> None:
    case = Case()
    async with running(case):
        await case.perform(events.Replay((step(5),), ()))
        await until(lambda: case.machine.has_seen(events.Applied))
        assert case.sync.log == []


async def test_the_machine_hears_of_everything_while_a_replay_waits_for_bytes() -> None:
    case = Case()
    case.sync.found.clear()
    async with running(case):
        await case.perform(events.Replay((step(6),), ()))
        await until(lambda: case.sync.asked)
        case.driver.receive(ANNE, hello())
        await until(lambda: case.machine.has_seen(events.Received))
        case.sync.found.set()
        await until(lambda: case.machine.has_seen(events.Applied))


async def test_what_replaces_a_replay_waits_for_the_step_that_it_has_begun() -> None:
    """The compute thread ends its job anyway. Oracle: the order, and that nothing of the step is missing."""
    case = Case()
    case.compute.free.clear()
    async with running(case):
        await case.perform(events.Replay((step(6), step(7)), ()))
        await until(lambda: case.sync.asked)
        await asyncio.sleep(0.01)
        await case.perform(events.Resync(None, ()))
        await case.perform(events.Resync(None, ()))
        await asyncio.sleep(0.01)
        assert case.sync.log == []
        case.compute.free.set()
        await until(lambda: case.machine.has_seen(events.Synced))
        assert case.log == ["absorbed 6", "kept 6", "told 6", "standing 6", "resync at 6"]
        assert case.committed == [6]
        assert not case.machine.has_seen(events.Applied)


@pytest.mark.parametrize(("is_choice", "asked"), [(False, (ANNE, BERT)), (True, (ANNE,))])
async def test_who_gives_up_a_branch_asks_only_those_who_stand_in_the_other(
    is_choice: bool, asked: tuple[PeerId, ...]
) -> None:
    """Everybody else may stand in the very branch that is given up. Bert is known from elsewhere."""
    case = Case()
    async with running(case):
        await case.perform(events.Resync(None, (ANNE,), is_choice=is_choice))
        await until(lambda: case.machine.has_seen(events.Synced))
        assert case.sync.sources == asked
        assert case.sync.forgets is is_choice
        assert case.forgotten == [STAGE] * is_choice, "whom we knew, we knew from there"


async def test_a_goodbye_ends_a_replay() -> None:
    case = Case()
    case.sync.found.clear()
    async with running(case):
        await case.perform(events.Replay((step(6),), ()))
        await until(lambda: case.sync.asked)
        await case.driver.say_goodbye()
        case.sync.found.set()
        await asyncio.sleep(0.01)
        assert case.sync.log == []


# -- answers -----------------------------------------------------------------------------------------------


async def test_files_that_strangers_ask_for_are_not_read_on_the_event_loop() -> None:
    """Oracle: the thread."""
    case = Case()
    answer = await case.driver.answer_log(LogRequest(stage=STAGE, since=Version(3)))
    assert answer.commits == ()
    assert threading.current_thread() not in case.history.threads
    assert case.history.threads


async def test_who_leaves_begins_no_further_round() -> None:
    """Its microbatches would be left half done, and be counted twice when others do them. Oracle: the gate."""
    case = Case()
    gate = Gate(run=RunId("0" * 32))
    case.driver._gate = gate
    async with running(case):
        await case.perform(OPENING)
        await until(lambda: gate.version_of(STAGE) == 5)
        opening = await gate.wait_open(STAGE)
        case.driver.post(events.Drain())
        await until(lambda: any(isinstance(event, events.Drain) for event in case.machine.seen))
        assert opening.is_open, "the round at hand is finished"
        await case.perform(replace(OPENING, round=RoundId(2), version=Version(6)))
        await until(lambda: not opening.is_open)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await gate.wait_open(STAGE)


def _weights(stage: int, speeds: tuple[float, ...], tokens: tuple[int, ...] = (0, 0, 0)) -> list[float]:
    names = [PeerId(name) for name in "abc"]
    commit = SimpleNamespace(
        stage=stage,
        generation=1,
        round=RoundId(3),
        version=Version(4),
        seats=[SimpleNamespace(peer=name) for name in names],
        speeds=speeds,
        contributors=[
            SimpleNamespace(peer=name, tokens=1000, weight=each) for name, each in zip(names, tokens, strict=True)
        ],
        total_tokens=sum(tokens),
    )
    return list(membership_of(cast(Any, commit), Lineage(bytes(32))).members.values())


def test_feeders_weigh_what_they_are_fast() -> None:
    """One of a tenth of the speed; one whom nobody has measured yet; one that hardly moves. Oracle: by hand."""
    assert _weights(0, (10.0, 10.0, 1.0)) == [10.0, 10.0, 1.0]
    assert _weights(0, (10.0, 30.0, 0.0)) == [10.0, 30.0, 10.0]
    assert _weights(0, (10.0, 10.0, 1e-6)) == [10.0, 10.0, 0.1]
    assert _weights(0, (10.0, 10.0, 1e15)) == [10.0, 10.0, 80.0], "whatever it claims"
    assert len(set(_weights(0, (0.0, 0.0, 0.0)))) == 1


def test_those_whom_others_send_to_weigh_half_of_what_they_did() -> None:
    """Whatever speed and tokens they claim. Oracle: by hand."""
    assert _weights(1, (1.0, 99.0, 99.0), (30, 60, 0)) == [30.0, 45.0, 15.0]
