"""The compute thread: what runs first, and how much it takes from the machine.

Oracle: the order and priorities in the module's docstring.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from functools import partial

import pytest

from peer.pipeline.compute import NICENESS, ComputeThread, Priority


async def test_backward_goes_before_forward_and_the_oldest_first() -> None:
    compute, go = ComputeThread(), threading.Event()
    ran: list[tuple[Priority, int]] = []
    held = compute.submit(go.wait, priority=Priority.CONTROL)
    jobs = [(Priority.FORWARD, 1), (Priority.BACKWARD, 2), (Priority.FORWARD, 0), (Priority.CONTROL, 9)]
    waiting = [compute.submit(partial(ran.append, job), priority=job[0], age=job[1]) for job in jobs]
    go.set()
    await asyncio.gather(held, *waiting)
    await compute.stop()
    assert ran == sorted(jobs)


async def test_an_error_reaches_who_awaits_the_job_and_the_next_job_runs() -> None:
    compute = ComputeThread()
    with pytest.raises(ZeroDivisionError):
        await compute.run(lambda: 1 // 0, priority=Priority.FORWARD)
    assert await compute.run(lambda: 2, priority=Priority.FORWARD) == 2
    await compute.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives a thread a priority of its own")
async def test_computing_yields_to_everything_else_on_the_machine() -> None:
    compute = ComputeThread()
    nice = await compute.run(
        lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), priority=Priority.CONTROL
    )
    await compute.stop()
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert nice == min(19, ours + NICENESS)
