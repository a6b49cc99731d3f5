"""Hops over real daemons: what a caller gets back when everything goes well, and when it does not."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from peer.pipeline.callee import HostedTask
from peer.tasks import DownstreamFailed, Outcome, Pulse, RoundOver, TaskId
from protocol.errors import TransientError, WireError
from protocol.ids import Lineage, RoundId, StageId, Version
from tests.peer.pipeline.swarm import BODY, LINEAGE, STAGE, Host, echo, hosts, task

pytestmark = pytest.mark.slow  # every test starts two or three real daemons


async def send(host: Host, number: int = 0, *, within_s: float = 20.0, retries: int = 2) -> Outcome:
    return await host.caller.send(
        task(number),
        STAGE,
        BODY,
        pulse=Pulse(furthest_stage=StageId(0)),
        deadline_s=time.monotonic() + within_s,
        retries_left=retries,
    )


async def test_a_hop_brings_the_gradient_and_a_signed_path(tmp_path: Path) -> None:
    """Oracle: the scripted work answers with the reversed body."""
    async with hosts(tmp_path, 2) as (caller, callee):
        await callee.serve(echo)
        caller.knows(callee)
        outcome = await send(caller)
        assert outcome.gradient == bytes(BODY.data)[::-1]
        assert (outcome.loss_sum, outcome.target_tokens) == (1.5, 2)
        assert outcome.path[0].signer == callee.peer_id
        await asyncio.sleep(0.05)
        assert callee.server is not None
        assert callee.server.num_tasks == 0, "an acknowledged answer is forgotten"


async def test_a_broken_stream_is_resumed_and_the_task_runs_once(tmp_path: Path) -> None:
    """Oracle: the connection is cut by the daemon while the work is held; the work must have run once."""
    async with hosts(tmp_path, 2) as (caller, callee):
        release = asyncio.Event()

        async def held(host: Host, hosted: HostedTask) -> Outcome:
            await release.wait()
            return await echo(host, hosted)

        await callee.serve(held)
        caller.knows(callee)
        sending = asyncio.create_task(send(caller))
        async with asyncio.timeout(10):
            while not callee.worked:  # noqa: ASYNC110 - the scripted host keeps a list, not an event
                await asyncio.sleep(0.02)
        await caller.p2p._client.control.disconnect(callee.p2p.peer_id)
        await asyncio.sleep(0.2)
        release.set()
        outcome = await sending
        assert outcome.gradient == bytes(BODY.data)[::-1]
        assert callee.worked == [task()]
        assert caller.caller.statistics.resumed == 1
        assert caller.caller.statistics.resent == 0


@pytest.mark.parametrize("times", [1, 2])
async def test_a_peer_that_has_forgotten_us_is_asked_once_more_and_not_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """It was restarted. Oracle: a door that does not know us so many times; who is penalised for it."""
    async with hosts(tmp_path, 2) as (caller, callee):

        class Forgetful:
            banned: frozenset[str] = frozenset()
            asked = 0

            def knock(self, peer: str) -> bool:
                return True

            def is_admitted(self, peer: str) -> bool:
                self.asked += 1
                return self.asked > times

        blamed: list[str] = []
        monkeypatch.setattr(callee.streams, "_door", Forgetful())
        monkeypatch.setattr(caller.caller._router, "penalise", lambda peer, now_s: blamed.append(peer))
        await callee.serve(echo)
        caller.knows(callee)
        outcome = await send(caller)
        assert outcome.gradient == bytes(BODY.data)[::-1]
        assert blamed == [callee.peer_id] * (times - 1)
        assert caller.caller.statistics.resent == times - 1


async def test_a_dead_replica_loses_its_task_to_another(tmp_path: Path) -> None:
    """Oracle: one of two replicas has its daemon killed in mid-task; the other one answers."""
    async with hosts(tmp_path, 3) as (caller, first, second):
        taken: list[Host] = []

        async def die_or_echo(host: Host, hosted: HostedTask) -> Outcome:
            taken.append(host)
            if len(taken) == 1:
                host.p2p._child.kill()
                await asyncio.sleep(60)
            return await echo(host, hosted)

        await first.serve(die_or_echo)
        await second.serve(die_or_echo)
        caller.knows(first, second)
        outcome = await send(caller)
        assert outcome.gradient == bytes(BODY.data)[::-1]
        assert len({host.peer_id for host in taken}) == 2
        assert caller.caller.statistics.resent == 1


async def test_a_frozen_round_ends_the_task(tmp_path: Path) -> None:
    """Oracle: the gate's rule; a frozen round is over, not something to retry."""
    async with hosts(tmp_path, 2) as (caller, callee):
        await callee.serve(echo)
        callee.gate.freeze(STAGE)
        caller.knows(callee)
        with pytest.raises(RoundOver):
            await send(caller)
        assert callee.worked == []


async def test_a_caller_ahead_is_held_until_the_round_opens(tmp_path: Path) -> None:
    """Oracle: the callee opens the round 0.3 s later, at the lineage that the caller knows."""
    async with hosts(tmp_path, 2) as (caller, callee):
        await callee.serve(echo)
        callee.gate.open(STAGE, round_id=RoundId(-1), version=Version(0), lineage=Lineage(b"\0" * 32))
        caller.knows(callee)
        sending = asyncio.create_task(send(caller))
        await asyncio.sleep(0.3)
        assert callee.worked == []
        callee.gate.open(STAGE, round_id=RoundId(0), version=Version(0), lineage=LINEAGE)
        assert (await sending).target_tokens == 2


async def test_a_stage_without_replicas_is_waited_for(tmp_path: Path) -> None:
    """Oracle: the stage gets its first member while the task waits; the caller's pulse says waiting meanwhile."""
    async with hosts(tmp_path, 2) as (caller, callee):
        await callee.serve(echo)
        pulse = Pulse(furthest_stage=StageId(0))
        sending = asyncio.create_task(
            caller.caller.send(task(), STAGE, BODY, pulse=pulse, deadline_s=time.monotonic() + 10, retries_left=0)
        )
        await asyncio.sleep(0.2)
        assert pulse.waiting
        caller.knows(callee)
        assert (await sending).target_tokens == 2


async def test_a_stage_whose_replicas_are_all_gone_is_waited_for(tmp_path: Path) -> None:
    """Or upstream would take us for dead, and give the task to a sibling that cannot do better.

    Oracle: the pulse, while the only known member is dead; and the retries, of which none may be spent on it.
    """
    async with hosts(tmp_path, 3) as (caller, dead, newcomer):
        await newcomer.serve(echo)
        await dead.p2p.shutdown()
        caller.knows(dead)
        pulse = Pulse(furthest_stage=StageId(0))
        sending = asyncio.create_task(
            caller.caller.send(task(), STAGE, BODY, pulse=pulse, deadline_s=time.monotonic() + 20, retries_left=0)
        )
        assert (StageId(1), None) == await asyncio.wait_for(caller.caller.on_stale_view.get(), 10.0)
        seen = [pulse.waiting]
        caller.knows(newcomer, round_id=1)
        assert (await sending).target_tokens == 2
        seen.append(pulse.waiting)
        assert seen == [True, False]
        assert caller.caller.statistics.resent == 0


async def test_who_leaves_is_not_asked_who_stays(tmp_path: Path) -> None:
    """It has stopped answering such questions. Oracle: the question goes to anybody, and nobody is called missing."""
    async with hosts(tmp_path, 2) as (caller, leaver):
        await leaver.serve(echo)
        leaver.gate.is_leaving = True
        caller.knows(leaver)
        sending = asyncio.create_task(send(caller, within_s=1.5))
        assert (StageId(1), None) == await asyncio.wait_for(caller.caller.on_stale_view.get(), 5.0)
        assert caller.view.suspects(now_s=time.monotonic()) == ()
        with pytest.raises(DownstreamFailed):
            await sending


async def test_no_progress_means_no_patience(tmp_path: Path) -> None:
    """Oracle: work that never ends and never progresses is given up after the silence limit."""
    async with hosts(tmp_path, 2, hop_silence_s=0.8) as (caller, callee):

        async def wedged(host: Host, hosted: HostedTask) -> Outcome:
            await asyncio.sleep(60)
            raise AssertionError("unreachable")

        await callee.serve(wedged)
        caller.knows(callee)
        started_s = time.monotonic()
        with pytest.raises(DownstreamFailed):
            await send(caller, retries=0)
        assert time.monotonic() - started_s < 10


async def test_busy_is_not_a_fault(tmp_path: Path) -> None:
    """Oracle: six tasks through one slot all come back, and nothing was sent twice."""
    async with hosts(tmp_path, 2) as (caller, callee):
        await callee.serve(echo, num_slots=1)
        caller.knows(callee)
        outcomes = await asyncio.gather(*(send(caller, number) for number in range(6)))
        assert len(outcomes) == len(callee.worked) == 6
        assert caller.caller.statistics.resent == 0


async def test_a_forged_answer_is_refused(tmp_path: Path) -> None:
    """Oracle: a callee that signs another gradient's digest than it sends is not believed."""
    async with hosts(tmp_path, 2) as (caller, callee):

        async def forge(host: Host, hosted: HostedTask) -> Outcome:
            honest = await echo(host, hosted)
            return Outcome(b"x" * 32, honest.gradient_digest, honest.loss_sum, honest.target_tokens, honest.path)

        await callee.serve(forge)
        caller.knows(callee)
        with pytest.raises(TransientError, match="signed something else"):
            await send(caller, retries=0)


async def test_a_replica_that_answers_with_a_failure_is_passed_over_and_not_called_dead(tmp_path: Path) -> None:
    """What it failed at may be somebody else's doing; "does not answer" would have it replaced."""
    async with hosts(tmp_path, 3) as (caller, failing, working):
        failed: list[TaskId] = []

        async def fail(host: Host, hosted: HostedTask) -> Outcome:
            failed.append(hosted.key.task)
            raise WireError("the gradient behind is none")

        await failing.serve(fail)
        await working.serve(echo)
        caller.knows(failing, working)
        number = 0
        while not failed and number < 8:
            outcome = await send(caller, number)
            assert outcome.path[0].signer == working.peer_id
            number += 1
        assert failed, "nothing was ever sent to the one that fails"
        assert caller.view.suspects(now_s=time.monotonic()) == ()
