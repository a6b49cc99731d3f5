"""Which microbatches pass the span together, and what each of them gets. The compute thread is the real one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import chain
from random import Random

import pytest

from peer.pipeline.compute import ComputeThread, Priority
from peer.pipeline.waves import Waves, nobody
from protocol.errors import PeerFault, SwarmError

LONG_S = 60.0  # a patience that no test waits for


@pytest.fixture
async def compute() -> AsyncIterator[ComputeThread]:
    thread = ComputeThread()
    yield thread
    await thread.stop()


class Recorder:
    """Work that notes its waves and answers every number with its square, or with the error it is told to."""

    def __init__(self) -> None:
        self.waves: list[list[int]] = []
        self.errors: dict[int, SwarmError] = {}

    def work(self, wave: list[int]) -> Sequence[int | SwarmError]:
        self.waves.append(wave)
        return [self.errors.get(number, number * number) for number in wave]


def anybody() -> bool:
    return True


async def ask(
    waves: Waves, recorder: Recorder, number: int, kind: str = "forward", may_follow: Callable[[], bool] = anybody
) -> int:
    result: int = await waves.run(
        kind, number, recorder.work, priority=Priority.FORWARD, age=number, may_follow=may_follow
    )
    return result


async def test_a_full_wave_starts_at_once(compute: ComputeThread) -> None:
    """Oracle: a patience that nobody could wait for."""
    waves, recorder = Waves(compute, size=lambda: 3, patience_s=LONG_S), Recorder()
    results = await asyncio.gather(*(ask(waves, recorder, number) for number in (5, 3, 4)))
    assert results == [25, 9, 16]
    assert recorder.waves == [[3, 4, 5]], "the oldest number goes first"


async def test_a_wave_that_does_not_fill_starts_when_its_first_has_waited_long_enough(compute: ComputeThread) -> None:
    waves, recorder = Waves(compute, size=lambda: 8, patience_s=0.01), Recorder()
    assert await asyncio.gather(*(ask(waves, recorder, number) for number in range(3))) == [0, 1, 4]
    assert recorder.waves == [[0, 1, 2]]


async def test_what_comes_while_the_thread_is_busy_joins(compute: ComputeThread) -> None:
    """Oracle: one wave of all, though the first was due before the others came."""
    waves, recorder = Waves(compute, size=lambda: 4, patience_s=0.0), Recorder()
    gate = threading.Event()
    blocking = compute.submit(gate.wait, priority=Priority.CONTROL)
    first = asyncio.create_task(ask(waves, recorder, 0))
    await asyncio.sleep(0.02)
    others = [asyncio.create_task(ask(waves, recorder, number)) for number in (1, 2)]
    await asyncio.sleep(0)
    gate.set()
    await blocking
    await asyncio.gather(first, *others)
    assert recorder.waves == [[0, 1, 2]]


async def test_more_than_a_wave_makes_several(compute: ComputeThread) -> None:
    waves, recorder = Waves(compute, size=lambda: 2, patience_s=0.01), Recorder()
    await asyncio.gather(*(ask(waves, recorder, number) for number in range(5)))
    assert sorted(number for wave in recorder.waves for number in wave) == list(range(5))
    assert max(map(len, recorder.waves)) == 2
    assert not waves._gatherings


async def test_kinds_do_not_mix(compute: ComputeThread) -> None:
    waves, recorder = Waves(compute, size=lambda: 2, patience_s=0.01), Recorder()
    await asyncio.gather(*(ask(waves, recorder, number, kind=f"round {number % 2}") for number in range(4)))
    assert sorted(recorder.waves) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("size", [1, 4])
async def test_one_microbatch_that_is_refused_does_not_spoil_the_others(compute: ComputeThread, size: int) -> None:
    waves, recorder = Waves(compute, size=lambda: size, patience_s=0.01), Recorder()
    recorder.errors = {1: PeerFault("nonsense")}
    results = await asyncio.gather(*(ask(waves, recorder, number) for number in range(3)), return_exceptions=True)
    assert [results[0], results[2]] == [0, 4]
    assert isinstance(results[1], PeerFault)


@pytest.mark.parametrize("size", [1, 2])
async def test_a_wave_that_fails_fails_for_all_in_it_and_for_nobody_else(compute: ComputeThread, size: int) -> None:
    """Oracle: the very error, and a later wave that works."""
    waves, recorder = Waves(compute, size=lambda: size, patience_s=0.01), Recorder()
    error = ZeroDivisionError("a bug")

    def broken(wave: list[int]) -> Sequence[int | SwarmError]:
        raise error

    run = (
        waves.run("forward", number, broken, priority=Priority.FORWARD, age=number, may_follow=anybody)
        for number in range(2)
    )
    assert await asyncio.gather(*run, return_exceptions=True) == [error, error]
    assert await ask(waves, recorder, 7) == 49


async def test_who_has_given_up_is_left_out(compute: ComputeThread) -> None:
    waves, recorder = Waves(compute, size=lambda: 8, patience_s=0.05), Recorder()
    leaving = asyncio.create_task(ask(waves, recorder, 1))
    staying = asyncio.create_task(ask(waves, recorder, 2))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await staying == 4
    assert recorder.waves == [[2]]


async def test_a_thread_that_stops_lets_nobody_wait(compute: ComputeThread) -> None:
    waves, recorder = Waves(compute, size=lambda: 2, patience_s=LONG_S), Recorder()
    gate = threading.Event()
    compute.submit(gate.wait, priority=Priority.CONTROL)
    waiting = [asyncio.create_task(ask(waves, recorder, number)) for number in range(2)]
    await asyncio.sleep(0.01)
    stopping = asyncio.create_task(compute.stop())
    await asyncio.sleep(0.01)
    gate.set()
    await stopping
    async with asyncio.timeout(5.0):
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


async def test_those_who_come_too_late_for_a_wave_wait_for_others_as_well(compute: ComputeThread) -> None:
    """Oracle: the two that came while the first wave ran go together, though the first of them was there before."""
    waves, recorder = Waves(compute, size=lambda: 2, patience_s=0.05), Recorder()
    gate = threading.Event()
    compute.submit(gate.wait, priority=Priority.CONTROL)
    first = [asyncio.create_task(ask(waves, recorder, number)) for number in range(3)]
    await asyncio.sleep(0.01)
    gate.set()
    await asyncio.gather(*first[:2])
    late = asyncio.create_task(ask(waves, recorder, 3))
    await asyncio.gather(first[2], late)
    assert recorder.waves == [[0, 1], [2, 3]]


async def test_what_gathers_is_let_go_when_the_span_ends(compute: ComputeThread) -> None:
    """Oracle: nobody waits, and nothing refers to the work any more."""
    waves, recorder = Waves(compute, size=lambda: 8, patience_s=LONG_S), Recorder()
    waiting = asyncio.create_task(ask(waves, recorder, 1))
    await asyncio.sleep(0)
    assert waves.num_gathering == 1
    waves.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (waves.num_gathering, recorder.waves) == (0, [])


async def test_those_who_give_up_take_what_they_knew_along(compute: ComputeThread) -> None:
    """A round is opened again: the same kind, of another board. Oracles: a patience that nobody could wait for; nothing
    is held on to in between."""
    waves, recorder = Waves(compute, size=lambda: 8, patience_s=LONG_S), Recorder()
    old = [asyncio.create_task(ask(waves, recorder, number)) for number in range(3)]
    await asyncio.sleep(0)
    for task in old:
        task.cancel()
    await asyncio.gather(*old, return_exceptions=True)
    assert (waves.num_gathering, waves._gatherings) == (0, {})
    async with asyncio.timeout(LONG_S / 10):
        assert await ask(waves, recorder, 5, may_follow=nobody) == 25
    assert recorder.waves == [[5]]


async def test_who_comes_last_knows_best_what_follows(compute: ComputeThread) -> None:
    """A wave of the old board is still in the thread when the round is opened again. Oracle: no patience."""
    waves, recorder = Waves(compute, size=lambda: 2, patience_s=LONG_S), Recorder()
    started, go = threading.Event(), threading.Event()

    def slow(wave: list[int]) -> Sequence[int | SwarmError]:
        started.set()
        go.wait()
        return recorder.work(wave)

    async def one(number: int, may_follow: Callable[[], bool]) -> int:
        result: int = await waves.run(
            "forward", number, slow, priority=Priority.FORWARD, age=number, may_follow=may_follow
        )
        return result

    old = [asyncio.create_task(one(number, anybody)) for number in range(2)]
    await asyncio.to_thread(started.wait)
    for task in old:
        task.cancel()
    new = asyncio.create_task(one(2, nobody))
    await asyncio.sleep(0)
    go.set()
    async with asyncio.timeout(LONG_S / 10):
        assert await new == 4
    assert recorder.waves == [[0, 1], [2]]


# -- when nobody else can come ----------------------------------------------------------------------------------------


async def coming(waves: Waves, recorder: Recorder, number: int, arrival: asyncio.Event) -> int:
    """Ask as one that was expected, and nobody after it but who is expected too."""
    with waves.expecting("forward"):
        await arrival.wait()
    return await ask(waves, recorder, number, may_follow=nobody)


async def test_a_wave_starts_at_once_when_nobody_else_can_come(compute: ComputeThread) -> None:
    """Oracle: a patience that nobody could wait for."""
    waves, recorder = Waves(compute, size=lambda: 8, patience_s=LONG_S), Recorder()
    assert await ask(waves, recorder, 3, may_follow=nobody) == 9
    assert recorder.waves == [[3]]


@pytest.mark.parametrize("seed", range(5))
async def test_a_wave_waits_for_whom_it_expects_in_whatever_order_they_come(compute: ComputeThread, seed: int) -> None:
    """Oracle: ten of them in waves of four are three waves, and everybody is in one."""
    waves, recorder, random = Waves(compute, size=lambda: 4, patience_s=LONG_S), Recorder(), Random(seed)
    arrivals = [asyncio.Event() for _ in range(10)]
    asked = [asyncio.create_task(coming(waves, recorder, number, arrivals[number])) for number in range(10)]
    for number in random.sample(range(10), 10):
        await asyncio.sleep(random.choice((0, 0.001)))
        arrivals[number].set()
    assert await asyncio.gather(*asked) == [number * number for number in range(10)]
    assert [len(wave) for wave in recorder.waves] == [4, 4, 2]
    assert sorted(chain(*recorder.waves)) == list(range(10))


async def test_one_that_was_expected_and_does_not_come_is_not_waited_for(compute: ComputeThread) -> None:
    waves, recorder = Waves(compute, size=lambda: 8, patience_s=LONG_S), Recorder()
    arrivals = [asyncio.Event(), asyncio.Event()]
    asked = [asyncio.create_task(coming(waves, recorder, number, arrivals[number])) for number in range(2)]
    await asyncio.sleep(0)
    arrivals[1].set()
    await asyncio.sleep(0.01)
    assert recorder.waves == []
    asked[0].cancel()
    assert await asked[1] == 1
    assert not waves._expected


async def test_what_is_left_behind_by_a_full_wave_goes_next_if_nobody_else_can_come(compute: ComputeThread) -> None:
    """Oracle: no patience, though the third came while the first two were under way."""
    waves, recorder = Waves(compute, size=lambda: 2, patience_s=LONG_S), Recorder()
    results = await asyncio.gather(*(ask(waves, recorder, number, may_follow=lambda: False) for number in range(3)))
    assert results == [0, 1, 4]
    assert sorted(chain(*recorder.waves)) == [0, 1, 2]


async def test_who_has_given_up_does_not_fill_a_wave(compute: ComputeThread) -> None:
    """Oracle: two that are there go together; the one that has left counts for nobody."""
    waves, recorder = Waves(compute, size=lambda: 2, patience_s=LONG_S), Recorder()
    leaving = asyncio.create_task(ask(waves, recorder, 0))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await asyncio.gather(*(ask(waves, recorder, number) for number in (1, 2))) == [1, 4]
    assert recorder.waves == [[1, 2]]
