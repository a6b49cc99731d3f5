"""A limited line: how fast, and who goes first. Time is a number here, but for the last tests, with a lower bound.

Oracle: the rate times the time that has passed, plus what an idle line saves up and the turn that may be overdrawn.
"""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import Digest, digest
from protocol.transport.streams import Stream, Streams
from protocol.transport.throttle import BURST_S, MAX_BULK_WAIT_S, Bucket, Lane, Line, Throttle
from tests.protocol.transport.network import StartNode

RATE = 1000.0
TURNS = st.lists(st.tuples(st.floats(0, 5), st.integers(1, 3000), st.sampled_from(Lane)), min_size=1, max_size=30)


@given(TURNS)
def test_a_line_never_moves_more_than_its_rate_and_moves_everything_in_the_end(
    asked: list[tuple[float, int, Lane]],
) -> None:
    bucket, now_s, moved, sizes = Bucket(RATE), 0.0, 0, {}
    for after_s, num_bytes, lane in asked:
        now_s += after_s
        sizes[bucket.queue(num_bytes, lane, now_s)] = num_bytes
        moved += sum(sizes.pop(number) for number in bucket.due(now_s))
        assert moved <= RATE * (now_s + BURST_S) + 3000
    while (wait_s := bucket.wait_s(now_s)) is not None:
        now_s += wait_s + 1e-9
        moved += sum(sizes.pop(number) for number in bucket.due(now_s))
        assert moved <= RATE * (now_s + BURST_S) + 3000
    assert not sizes


def test_a_busy_line_is_as_fast_as_its_rate() -> None:
    """Ten thousand bytes take ten seconds, less what was saved up and the last turn, which is paid afterwards."""
    bucket, now_s = Bucket(RATE), 0.0
    bucket.due(now_s)
    for _ in range(100):
        bucket.queue(100, Lane.BULK, now_s)
    given = len(bucket.due(now_s))
    while (wait_s := bucket.wait_s(now_s)) is not None:
        now_s += max(wait_s, 1e-6)
        given += len(bucket.due(now_s))
    assert given == 100
    assert now_s == pytest.approx(10.0, abs=0.25)


def test_activations_go_before_what_has_waited_longer() -> None:
    bucket = Bucket(RATE)
    first, average, activation = (bucket.queue(500, lane, 0.0) for lane in (Lane.BULK, Lane.BULK, Lane.PROMPT))
    assert bucket.due(0.0) == [activation]
    assert bucket.due(0.5) == [first]
    assert bucket.due(1.0) == [average]


def test_activations_without_end_do_not_starve_an_average() -> None:
    """Its other end would take us for dead."""
    bucket, now_s = Bucket(RATE), 0.0
    average = bucket.queue(500, Lane.BULK, now_s)
    while True:
        bucket.queue(2000, Lane.PROMPT, now_s)
        if average in bucket.due(now_s):
            break
        now_s += 1.0
        assert now_s < 2 * MAX_BULK_WAIT_S
    assert now_s > MAX_BULK_WAIT_S


def test_what_does_not_wait_is_paid_for_by_what_comes_next() -> None:
    bucket = Bucket(RATE)
    bucket.spend(1500, 0.0)
    turn = bucket.queue(1, Lane.PROMPT, 0.0)
    assert bucket.due(1.0) == []
    assert bucket.wait_s(1.0) == pytest.approx(0.5)
    assert bucket.due(1.5) == [turn]


async def test_who_stops_waiting_holds_up_nobody() -> None:
    throttle = Throttle(mbps=8 * RATE / 1e6)
    await throttle.take(300, Lane.BULK)
    quitter = asyncio.create_task(throttle.take(1 << 40, Lane.PROMPT))
    patient = asyncio.create_task(throttle.take(1, Lane.BULK))
    await asyncio.sleep(0.05)
    quitter.cancel()
    async with asyncio.timeout(5.0):
        await patient


async def test_without_a_limit_nobody_waits() -> None:
    async with asyncio.timeout(5.0):
        await Throttle().take(1 << 60, Lane.BULK)


@pytest.mark.slow
@pytest.mark.parametrize("limited", ["up", "down"])
async def test_a_body_takes_as_long_as_the_line_says(limited: str, start: StartNode) -> None:
    """Two real daemons: 2 MiB at 16 Mbit/s, either way. Oracle: the arithmetic, as a lower bound; and the hash."""
    slow = Throttle(mbps=16.0)
    second = await start("second")
    first = await start("first", peers=await second.addresses())
    sending = Streams(first.p2p, line=Line(up=slow) if limited == "up" else None)
    receiving = Streams(second.p2p, line=Line(down=slow) if limited == "down" else None)
    body, got = bytes(range(256)) * (1 << 13), asyncio.get_running_loop().create_future()

    async def take(stream: Stream) -> None:
        _, found = await stream.receive_body(len(body))
        got.set_result(found)

    await receiving.serve("body", take)
    started_s = time.monotonic()
    async with sending.open(second.peer_id, "body") as stream:
        sent = await stream.send_body(memoryview(body))
        found: Digest = await asyncio.wait_for(got, timeout=30.0)
    least_s = (len(body) - (1 << 20)) / 2e6 - BURST_S  # the last chunk is paid afterwards
    assert time.monotonic() - started_s >= least_s
    assert sent == found == digest(body)
    await sending.stop()
    await receiving.stop()
