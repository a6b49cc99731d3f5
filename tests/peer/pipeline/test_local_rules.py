"""The pipeline's rules that need no network: gate, slots, board, router, compute thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Mapping
from types import MappingProxyType

import pytest

from peer.pipeline.board import Board, takeover_s
from peer.pipeline.compute import ComputeThread, Priority
from peer.pipeline.router import Router
from peer.pipeline.slots import SlotPool
from peer.pipeline.view import Membership, View
from peer.tasks import Pulse
from protocol.batches import Microbatch, TaskKind
from protocol.ids import Lineage, PeerId, RoundId, RunId, StageId, Version

ANNE, BERT, CARA = PeerId("anne"), PeerId("bert"), PeerId("cara")
TAKEOVER_S = 4.0


def microbatches(count: int) -> list[Microbatch]:
    return [Microbatch(number, TaskKind.TRAIN, (number,)) for number in range(count)]


def board(
    me: PeerId,
    *,
    feeders: tuple[PeerId, ...] = (ANNE, BERT),
    count: int = 12,
    waves: Mapping[PeerId, int] = MappingProxyType({}),
    gone: Collection[PeerId] = (),
) -> Board:
    return Board(
        RoundId(0),
        plan=microbatches(count),
        seed="s",
        me=me,
        feeders=dict.fromkeys(feeders, 1.0),
        takeover_s=lambda owner: TAKEOVER_S * waves.get(owner, 1),
        is_gone=lambda peer: peer in gone,
        now_s=0.0,
    )


def take_all(one: Board, *, now_s: float) -> set[int]:
    taken = set()
    while (microbatch := one.take_next(now_s=now_s)) is not None:
        taken.add(microbatch.number)
    return taken


def test_two_feeders_share_a_round_without_talking() -> None:
    """Oracle: rendezvous hashing partitions the numbers."""
    mine, theirs = take_all(board(ANNE), now_s=0.0), take_all(board(BERT), now_s=0.0)
    assert mine | theirs == set(range(12))
    assert not mine & theirs


def test_a_silent_owner_loses_its_numbers_after_a_while_and_not_before() -> None:
    """Oracle: the takeover rule; the second in line waits one interval."""
    anne = board(ANNE)
    mine = take_all(anne, now_s=0.0)
    assert take_all(anne, now_s=TAKEOVER_S * 0.9) == set()
    assert take_all(anne, now_s=TAKEOVER_S) == set(range(12)) - mine


def test_what_a_dead_owner_has_left_is_divided_at_once() -> None:
    """Nobody waits for who cannot come back in this round. Oracle: two of three have everything between them."""
    three = (ANNE, BERT, CARA)
    shares = [take_all(board(me, feeders=three, gone={CARA}), now_s=0.0) for me in (ANNE, BERT)]
    assert shares[0] | shares[1] == set(range(12))
    assert not shares[0] & shares[1]
    assert take_all(board(ANNE, feeders=(BERT,), gone={BERT}), now_s=0.0) == set(range(12))


def test_who_works_through_what_it_has_inherited_is_left_in_peace() -> None:
    """Oracle: a third feeder takes nothing of the heir's while the heir shows something new now and then."""
    one = board(ANNE, feeders=(ANNE, BERT, CARA), count=60, gone={CARA})
    own = take_all(one, now_s=0.0)
    others = sorted(set(range(60)) - own)
    for step, number in enumerate(others[:-1]):
        one.learn_done(others[: step + 1], now_s=0.5 * TAKEOVER_S * (step + 1))
        assert take_all(one, now_s=0.5 * TAKEOVER_S * (step + 1) + 0.1) == set(), number


def test_who_is_gone_is_back_once_a_commit_names_it() -> None:
    view = View()
    view.note_gone(BERT, now_s=0.0)
    assert (view.is_gone(BERT), view.is_gone(ANNE)) == (True, False)
    view.learn(membership(2))
    assert not view.is_gone(BERT)


def test_every_owner_is_left_in_peace_for_as_long_as_its_own_wave_takes() -> None:
    """Oracle: Bert has waves of one and Cara of eight: Anne gets his numbers first, then hers."""
    anne = board(ANNE, feeders=(ANNE, BERT, CARA), count=60, waves={CARA: 8})
    berts, caras = (take_all(board(owner, feeders=(ANNE, BERT, CARA), count=60), now_s=0.0) for owner in (BERT, CARA))
    mine = take_all(anne, now_s=0.0)
    assert take_all(anne, now_s=2 * TAKEOVER_S) == berts
    assert take_all(anne, now_s=8 * TAKEOVER_S - 0.1) == set()
    assert take_all(anne, now_s=16 * TAKEOVER_S) == caras == set(range(60)) - mine - berts


def test_an_owner_that_moves_keeps_its_numbers() -> None:
    """Oracle: a done-bit of the owner resets its silence."""
    anne = board(ANNE)
    mine = take_all(anne, now_s=0.0)
    theirs = sorted(set(range(12)) - mine)
    anne.learn_done(theirs[:1], now_s=TAKEOVER_S * 0.9)
    assert take_all(anne, now_s=TAKEOVER_S * 1.5) == set()


def test_a_failed_number_is_tried_again_later() -> None:
    """Oracle: `not_before_s`."""
    anne = board(ANNE, feeders=(ANNE,), count=1)
    microbatch = anne.take_next(now_s=0.0)
    assert microbatch is not None
    anne.give_back(microbatch, not_before_s=1.0)
    assert anne.take_next(now_s=0.9) is None
    assert anne.take_next(now_s=1.0) == microbatch
    anne.finish(microbatch, now_s=1.1)
    assert anne.num_left == 0


async def test_the_oldest_number_gets_the_next_slot() -> None:
    """Oracle: three callers wait for one slot; they get it in the order of their numbers."""
    pool = SlotPool(num_slots=lambda: 1)
    assert await pool.acquire(ANNE, round_id=RoundId(0), number=9, timeout_s=1)
    order: list[int] = []

    async def wait(number: int) -> None:
        assert await pool.acquire(BERT, round_id=RoundId(0), number=number, timeout_s=5)
        order.append(number)
        pool.release(BERT)

    waiting = [asyncio.create_task(wait(number)) for number in (7, 3, 5)]
    await asyncio.sleep(0)
    pool.release(ANNE)
    await asyncio.gather(*waiting)
    assert order == [3, 5, 7]
    assert pool.num_held == 0


async def test_one_caller_cannot_hoard_slots_that_others_wait_for() -> None:
    """Oracle: the quota; an older number of a greedy caller goes after a modest one's."""
    pool = SlotPool(num_slots=lambda: 2)
    for number in (0, 1):
        assert await pool.acquire(ANNE, round_id=RoundId(0), number=number, timeout_s=1)
    order: list[PeerId] = []

    async def wait(caller: PeerId, number: int) -> None:
        assert await pool.acquire(caller, round_id=RoundId(0), number=number, timeout_s=5)
        order.append(caller)

    waiting = [asyncio.create_task(wait(ANNE, 2)), asyncio.create_task(wait(BERT, 3))]
    await asyncio.sleep(0)
    pool.release(ANNE)
    pool.release(ANNE)
    await asyncio.gather(*waiting)
    assert order == [BERT, ANNE]


async def test_a_slot_that_nobody_frees_means_busy() -> None:
    """Oracle: acquire returns False after its timeout and leaves no ghost in the line."""
    pool = SlotPool(num_slots=lambda: 1)
    assert await pool.acquire(ANNE, round_id=RoundId(0), number=0, timeout_s=1)
    assert not await pool.acquire(BERT, round_id=RoundId(0), number=1, timeout_s=0.01)
    pool.release(ANNE)
    assert await pool.acquire(CARA, round_id=RoundId(0), number=2, timeout_s=0.01)


async def test_there_may_be_more_slots_later() -> None:
    """Oracle: who waits for a slot gets one of the new ones when somebody comes; fewer slots take none away."""
    num_slots = 1
    pool = SlotPool(num_slots=lambda: num_slots)
    assert await pool.acquire(ANNE, round_id=RoundId(0), number=0, timeout_s=1)
    waiting = asyncio.create_task(pool.acquire(BERT, round_id=RoundId(0), number=1, timeout_s=5))
    await asyncio.sleep(0)
    num_slots = 3
    assert await pool.acquire(CARA, round_id=RoundId(0), number=2, timeout_s=1)
    assert await waiting
    num_slots = 1
    assert pool.num_held == 3
    pool.release(ANNE)
    assert not await pool.acquire(ANNE, round_id=RoundId(0), number=3, timeout_s=0.01)


def test_a_board_knows_whether_there_is_anything_left_to_feed_of_a_kind() -> None:
    """Oracle: `take_next`. What is in flight, done, or to be tried again later is not left."""
    anne = board(ANNE, feeders=(ANNE,), count=2)
    assert anne.has_next(TaskKind.TRAIN, now_s=0.0)
    assert not anne.has_next(TaskKind.EVAL, now_s=0.0)
    first, second = anne.take_next(now_s=0.0), anne.take_next(now_s=0.0)
    assert first is not None
    assert second is not None
    assert not anne.has_next(TaskKind.TRAIN, now_s=0.0)
    anne.finish(first, now_s=0.0)
    anne.give_back(second, not_before_s=1.0)
    assert not anne.has_next(TaskKind.TRAIN, now_s=0.9)
    assert anne.has_next(TaskKind.TRAIN, now_s=1.0)


def test_what_is_done_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round may have tens of thousands of numbers. Oracle: how many are considered; and a bit that falls is seen."""
    considered: list[int] = []
    is_takeable = Board._is_takeable

    def counted(self: Board, number: int, *, now_s: float) -> bool:
        considered.append(number)
        return is_takeable(self, number, now_s=now_s)

    monkeypatch.setattr(Board, "_is_takeable", counted)
    anne = board(ANNE, feeders=(ANNE,), count=1000)
    anne.learn_done(range(990), now_s=0.0)
    assert anne.has_next(TaskKind.TRAIN, now_s=0.0)
    assert not anne.has_next(TaskKind.EVAL, now_s=0.0)
    next_one = anne.take_next(now_s=0.0)
    assert next_one is not None
    assert next_one.number == 990
    assert set(considered) == {990}
    anne.learn_done(range(5, 990), now_s=0.0)
    assert anne.num_left == 15
    fallen = anne.take_next(now_s=0.0)
    assert fallen is not None
    assert fallen.number == 0


async def test_backward_overtakes_forward_and_old_overtakes_young() -> None:
    """Oracle: the order in which a blocked compute thread works its queue off."""
    compute = ComputeThread()
    gate = threading.Event()
    blocker = compute.submit(gate.wait, priority=Priority.CONTROL)
    done: list[str] = []
    jobs = [
        compute.run(lambda: done.append("forward 2"), priority=Priority.FORWARD, age=2),
        compute.run(lambda: done.append("forward 1"), priority=Priority.FORWARD, age=1),
        compute.run(lambda: done.append("backward 9"), priority=Priority.BACKWARD, age=9),
    ]
    waiting = asyncio.gather(*jobs)
    await asyncio.sleep(0)
    gate.set()
    await waiting
    await blocker
    assert done == ["backward 9", "forward 1", "forward 2"]
    await compute.stop()


async def test_an_error_in_the_compute_thread_reaches_whoever_asked() -> None:
    """Oracle: the very exception is raised, and the thread goes on."""
    compute = ComputeThread()
    with pytest.raises(ZeroDivisionError):
        await compute.run(lambda: 1 / 0, priority=Priority.FORWARD)
    assert await compute.run(lambda: 7, priority=Priority.FORWARD) == 7
    await compute.stop()


def membership(version: int, *, generation: int = 1, members: tuple[PeerId, ...] = (ANNE, BERT)) -> Membership:
    return Membership(
        stage=StageId(1),
        generation=generation,
        round=RoundId(version),
        version=Version(version),
        lineage=Lineage(bytes(32)),
        members=dict.fromkeys(members, 1.0),
    )


def test_the_view_never_goes_back_but_follows_a_new_charter() -> None:
    """Oracle: the order (generation, round, version)."""
    view = View()
    assert view.learn(membership(5))
    assert not view.learn(membership(4))
    assert view.learn(membership(2, generation=2))
    current = view.membership(StageId(1))
    assert current is not None
    assert current.version == 2


def test_a_suspect_is_passed_over_unless_nobody_else_is_left() -> None:
    """Oracle: live members with and without suspects."""
    view = View()
    view.learn(membership(0))
    view.suspect(ANNE, now_s=0.0)
    assert set(view.live_members(StageId(1), now_s=0.1)) == {BERT}
    view.suspect(BERT, now_s=0.0)
    assert set(view.live_members(StageId(1), now_s=0.1)) == {ANNE, BERT}


def test_who_is_passed_over_is_no_suspect() -> None:
    """It answered, and the coordinator must not hear that it is missing."""
    view = View()
    view.learn(membership(0))
    view.pass_over(ANNE, now_s=0.0)
    view.suspect(BERT, now_s=0.0)
    assert not view.has_live(StageId(1), now_s=0.1)
    assert view.suspects(now_s=0.1) == (BERT,)
    assert view.has_live(StageId(1), now_s=60.0)
    assert view.suspects(now_s=60.0) == ()


@pytest.mark.parametrize(
    ("task_s", "expected_s"), [(None, 20.0), (0.1, 4.0), (60.0, 180.0)], ids=["unknown", "fast", "slow"]
)
def test_slow_pipelines_leave_each_other_in_peace_for_longer(task_s: float | None, expected_s: float) -> None:
    """Oracle: by hand; a number that takes a minute must not be fed by everybody after four seconds."""
    assert takeover_s(task_s, at_first_s=20.0) == expected_s


@pytest.mark.parametrize(
    ("task_s", "wave", "expected_s"),
    [(2.0, 2, 12.0), (2.0, 64, 26.0), (0.1, 8, 4.0), (60.0, 8, 200.0), (None, 8, 40.0)],
)
def test_who_brings_whole_waves_is_left_in_peace_for_longer(task_s: float | None, wave: int, expected_s: float) -> None:
    """Oracle: by hand; three times as long as its wave takes, but for what it says no more than 20 s longer."""
    assert takeover_s(task_s, at_first_s=20.0, wave=wave) == expected_s


def test_the_router_prefers_the_faster_of_the_drawn_three() -> None:
    """Oracle: with three replicas all are drawn, so the measured order must come out."""
    router = Router(run=RunId("r"))
    replicas = dict.fromkeys((ANNE, BERT, CARA), 1.0)
    for peer, task_s in ((ANNE, 3.0), (BERT, 1.0), (CARA, 2.0)):
        router.observe(peer, task_s=task_s, load_s=0.0, now_s=0.0)
    assert _order(router, replicas, now_s=0.0) == [BERT, CARA, ANNE]


def test_one_slow_answer_is_forgotten_in_time() -> None:
    """Who is never chosen is never measured again. Oracle: the order of two peers, by hand."""
    router = Router(run=RunId("r"))
    router.observe(ANNE, task_s=20.0, load_s=0.0, now_s=0.0)
    for second in range(400):
        router.observe(BERT, task_s=1.0, load_s=0.0, now_s=float(second))
        if _order(router, {ANNE: 1.0, BERT: 1.0}, now_s=float(second))[0] == ANNE:
            break
    assert 100 < second < 200


def test_a_replica_that_fails_is_tried_less_and_less_often() -> None:
    """Oracle: how often the broken one comes first in ten minutes, one choice a second; a new one always does."""
    router, chosen = Router(run=RunId("r")), []
    for second in range(600):
        first = _order(router, {ANNE: 1.0, BERT: 1.0}, now_s=float(second))[0]
        chosen.append(first)
        if first == ANNE:
            router.penalise(ANNE, now_s=float(second))
        else:
            router.observe(BERT, task_s=1.0, load_s=0.0, now_s=float(second))
    assert 1 <= chosen.count(ANNE) <= 6
    router.observe(ANNE, task_s=0.5, load_s=0.0, now_s=600.0)
    assert _order(router, {ANNE: 1.0, BERT: 1.0}, now_s=600.0)[0] == ANNE, "a penalty outlives its cause"


def test_a_replica_that_dies_with_all_its_tasks_has_failed_once() -> None:
    """Oracle: one that lost a single task; both come back at the same time."""
    router = Router(run=RunId("r"))
    for _ in range(8):
        router.penalise(ANNE, now_s=0.0)
    router.penalise(BERT, now_s=0.0)
    for second in (1.0, 20.0, 100.0):
        router.observe(CARA, task_s=1.0, load_s=0.0, now_s=second)
        first, *others = _order(router, dict.fromkeys((ANNE, BERT, CARA), 1.0), now_s=second)
        assert (first == CARA) == (second < 100.0), "a death is held against it for too long, or not at all"
        assert set(others) | {first} == {ANNE, BERT, CARA}


def test_a_queue_that_was_reported_is_worked_off_meanwhile() -> None:
    router = Router(run=RunId("r"))
    router.observe(ANNE, task_s=1.0, load_s=4.0, now_s=0.0)
    router.observe(BERT, task_s=2.0, load_s=0.0, now_s=0.0)
    assert _order(router, {ANNE: 1.0, BERT: 1.0}, now_s=1.0) == [BERT, ANNE]
    assert _order(router, {ANNE: 1.0, BERT: 1.0}, now_s=5.0) == [ANNE, BERT]


def _order(router: Router, replicas: dict[PeerId, float], *, now_s: float) -> list[PeerId]:
    return list(router.order(round_id=RoundId(0), number=0, stage=StageId(1), replicas=replicas, now_s=now_s))


def test_the_pulse_only_ever_grows() -> None:
    """Oracle: what upstream compares, (furthest stage, work), by hand."""
    pulse = Pulse(furthest_stage=StageId(1))
    seen = [(pulse.furthest_stage, pulse.work)]
    for stage in (2, 2, 1, 3):
        pulse.advance(StageId(stage))
        seen.append((pulse.furthest_stage, pulse.work))
    pulse.tick(3)
    pulse.tick(3)
    seen.append((pulse.furthest_stage, pulse.work))
    assert seen == [(1, 0), (2, 1), (2, 2), (2, 3), (3, 4), (3, 5)]


def test_a_bit_that_only_a_dead_clock_vouched_for_falls_again() -> None:
    """Oracle: a later word of the clock without that bit; what we finished ourselves stays done."""
    anne = board(ANNE, feeders=(ANNE,), count=3)
    first = anne.take_next(now_s=0.0)
    assert first is not None
    anne.finish(first, now_s=0.1)
    anne.learn_done((0, 1, 2), now_s=0.2)
    assert anne.num_left == 0
    anne.learn_done((), now_s=0.3)
    assert anne.num_left == 2
    assert take_all(anne, now_s=0.3) == {1, 2}
