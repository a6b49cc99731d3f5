"""Reports become counters once, and only if they can be believed.

Oracles: numbers that were put into the reports, added up by hand.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from coordinator.store import history, tallies
from coordinator.store.database import Connection
from coordinator.store.history import MAX_AVERAGINGS_PER_ROUND, MAX_WORK_PER_ROUND
from protocol.control import Report
from protocol.errors import PeerFault
from protocol.ids import RoundId, Version
from protocol.rounds.messages import Contribution
from protocol.signing import Signed, seal
from tests.coordinator.office import (
    NO_LINEAGE,
    Office,
    StoppedTime,
    Volunteer,
    averaging,
    closing,
    closing_report,
    commit,
    commit_report,
    open_office,
    sign_closing,
    sign_commit,
    state,
    work,
)

A, B, C = Volunteer("a"), Volunteer("b"), Volunteer("c")
FIRST = 10


async def ready_office(office: Office) -> None:
    """Let A, B and C in, and found both stages so that commits have a generation to belong to."""
    for number, volunteer in enumerate((A, B, C)):
        await office.join(volunteer)
        await office.beat(volunteer, state(number % 2))
    await office.tick()


async def report(office: Office, by: Volunteer, *reports: Report, first: int = FIRST) -> int:
    """Send reports with rising numbers; return what was acknowledged."""
    numbered = tuple((first + offset, one) for offset, one in enumerate(reports))
    return (await office.beat(by, state(0), reports=numbered)).acknowledged


async def counters(office: Office) -> tallies.Counters:
    return await office.services.database.run(tallies.counters)


def committed(office: Office, under: Signed, *members: Volunteer, stage: int = 0, **changes: Any) -> Signed:
    message = commit(office.manifest, stage, under, members=members, parent=NO_LINEAGE, **changes)
    return sign_commit(members[0], message)


async def test_every_counter_counts(tmp_path: Path) -> None:
    """Each counter of the ledger is made non-zero by the reports that it stands for, with a value of its own."""
    async with open_office(tmp_path) as office:
        await ready_office(office)
        short = sign_closing(A, closing(office.manifest, 0, tasks=3))
        full = sign_closing(A, closing(office.manifest, 1))
        both = committed(office, short, A, C, tokens_dropped=17, double_counted=5)
        alone = committed(office, full, A, tokens_dropped=2)
        await report(
            office,
            A,
            closing_report(short),
            closing_report(full),
            commit_report(both),
            commit_report(alone),
            averaging(0, 0, ballot=1, ok=False, reason="b was gone"),
            averaging(0, 0, ballot=2),
            work(0, tasks_resent=2, hops=6, activation_bytes=1000),
            work(1, tasks_resent=1, hops=5, activation_bytes=500),
        )
        await report(office, C, commit_report(both), averaging(0, 0, ballot=2), work(0, hops=7, activation_bytes=10))
        office.time.advance(60.0)
        await office.tick()
        found = asdict(await counters(office))
        assert found == {
            "tasks_done": 7,
            "tasks_lost": 1,
            "tasks_resent": 3,
            "tokens": 7 * 64,
            "tokens_dropped": 19,
            "double_counted": 5,
            "averagings_ok": 1,
            "averagings_failed": 1,
            "rounds_solo": 1,
            "rounds_rolled_back": 0,
            "hops": 18,
            "activation_bytes": 1510,
            "peers_joined": 3,
            "peers_lost": 3,
            "peers_left": 0,
        }


async def test_a_report_that_is_repeated_counts_once_also_after_a_restart(tmp_path: Path) -> None:
    time = StoppedTime()
    async with open_office(tmp_path, time=time) as office:
        await ready_office(office)
        assert await report(office, A, work(0, hops=3), work(1, hops=4)) == FIRST + 1
        assert await report(office, A, work(0, hops=3), work(1, hops=4)) == FIRST + 1
    async with open_office(tmp_path, time=time) as office:
        assert await report(office, A, work(0, hops=3), work(1, hops=4), work(2, hops=5)) == FIRST + 2
        assert (await counters(office)).hops == 12


async def test_of_one_round_a_peer_can_say_only_so_much(tmp_path: Path) -> None:
    """Or it could fill the disk. Oracle: rows; what others say, and what it says of another round, is kept.

    What is not kept is acknowledged too, or it would come again.
    """
    async with open_office(tmp_path) as office:
        await ready_office(office)
        much = [work(0)] * (2 * MAX_WORK_PER_ROUND)
        many = [averaging(0, 0, ballot=ballot) for ballot in range(1, 2 * MAX_AVERAGINGS_PER_ROUND)]
        assert await report(office, A, *much, work(1)) == FIRST + len(much)
        assert await report(office, A, *many, averaging(1, 0), first=100) == 100 + len(many)
        await report(office, C, work(0), averaging(0, 0))

        def kept(db: Connection) -> tuple[int, int]:
            (works,) = db.execute("SELECT count(*) FROM work").fetchone()
            (averagings,) = db.execute("SELECT count(*) FROM averagings").fetchone()
            return works, averagings

        found = await office.services.database.run(kept)
        assert found == (MAX_WORK_PER_ROUND + 2, MAX_AVERAGINGS_PER_ROUND + 2)


async def test_a_closing_that_many_report_is_one_round(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await ready_office(office)
        signed = sign_closing(A, closing(office.manifest, 0))
        for volunteer in (A, B, C):
            await report(office, volunteer, closing_report(signed))
        assert (await counters(office)).tasks_done == 4


async def test_two_members_must_have_taken_the_same_bytes(tmp_path: Path) -> None:
    """Oracle: the definition of `averagings_ok`: a joiner or one member alone is not enough."""
    async with open_office(tmp_path) as office:
        await ready_office(office)
        under = sign_closing(A, closing(office.manifest, 0))
        signed = committed(office, under, A, B, joiners=[C])
        await report(office, A, commit_report(signed))
        await report(office, C, commit_report(signed))
        assert (await counters(office)).averagings_ok == 0
        await report(office, B, commit_report(signed))
        assert (await counters(office)).averagings_ok == 1


async def test_commits_alone_tell_of_a_round_whose_closing_never_arrived(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await ready_office(office)
        under = sign_closing(A, closing(office.manifest, 0, tasks=2))
        await report(office, B, commit_report(committed(office, under, B, stage=1)))
        found = await counters(office)
        assert (found.tasks_done, found.tasks_lost, found.tokens) == (2, 2, 128)


async def test_a_round_that_was_trained_again_counts_as_it_stands(tmp_path: Path) -> None:
    """After a restart from a checkpoint the commits of the higher generation name the closing that stands."""
    async with open_office(tmp_path) as office:
        await ready_office(office)
        first = sign_closing(A, closing(office.manifest, 0, tasks=3, loss_sum=900.0))
        await report(office, A, closing_report(first), commit_report(committed(office, first, A)))
        for volunteer in (A, B, C):  # everything died, and came back
            await office.join(volunteer, session=2)
            await office.beat(volunteer, state(0 if volunteer is not B else 1, version=0))
        for _ in range(5):
            await office.tick(5.0)
            for volunteer in (A, B, C):
                await office.beat(volunteer, state(0 if volunteer is not B else 1, version=0))
        assert {charter.generation for charter in office.charters().values()} == {2}
        again = sign_closing(A, closing(office.manifest, 0, loss_sum=800.0))
        redone = committed(office, again, A, generation=2)
        await report(office, A, closing_report(again), commit_report(redone), first=FIRST + 10)
        await report(office, C, closing_report(first))  # a late repetition of the past changes nothing
        (tally,) = await office.services.database.run(tallies.round_tallies)
        assert (tally.tasks_done, tally.loss) == (4, 800.0 / 256)


async def found_again(office: Office, *, session: int, version: int) -> None:
    """Everything dies and comes back with the state of a checkpoint."""
    restored = {"version": Version(version), "round": RoundId(version)}
    for volunteer in (A, B, C):
        await office.join(volunteer, session=session)
    for _ in range(5):
        for volunteer in (A, B, C):
            await office.beat(volunteer, state(0 if volunteer is not B else 1, **restored))
        await office.tick(5.0)
    assert {charter.generation for charter in office.charters().values()} == {session}


async def losses(office: Office) -> list[tuple[int, int, int, int, int, int]]:
    rows = await office.services.database.run(tallies.rollbacks)
    return sorted((row.stage, row.generation, row.version_before, row.version, row.rounds, row.tokens) for row in rows)


async def test_updates_that_a_restored_stage_does_not_contain_are_counted(tmp_path: Path) -> None:
    """Oracle: versions and tokens of the commits, by hand. Every update here is of 256 tokens.

    A restart of the coordinator, and a report that arrives only after the founding, change nothing about it.
    """
    time = StoppedTime()
    async with open_office(tmp_path, time=time) as office:
        await ready_office(office)
        under = [sign_closing(A, closing(office.manifest, number)) for number in range(4)]
        zero = [commit_report(committed(office, closed, A, C)) for closed in under[:3]]
        one = [commit_report(committed(office, closed, B, stage=1)) for closed in under[:3]]
        await report(office, A, *zero)
        await report(office, C, *zero)
        await report(office, B, *one[:2])
        assert (await counters(office)).rounds_rolled_back == 0
        await found_again(office, session=2, version=1)
        assert await losses(office) == [(0, 2, 3, 1, 2, 512), (1, 2, 2, 1, 1, 256)]
        found = await counters(office)
        assert (found.rounds_rolled_back, found.tokens_dropped) == (3, 768)
        told = await office.services.database.run(history.last_events, limit=50)
        assert [event.detail for event in told if event.kind == "stage.rolled_back"] == [
            "stage 1 generation 2: from version 2 to 1, 1 committed rounds with 256 tokens are gone",
            "stage 0 generation 2: from version 3 to 1, 2 committed rounds with 512 tokens are gone",
        ]
        await report(office, B, *one, first=FIRST + 50)
        assert (await losses(office))[1] == (1, 2, 3, 1, 2, 512)
    async with open_office(tmp_path, time=time) as office:
        assert (await counters(office)).rounds_rolled_back == 4
        again = committed(office, under[1], A, C, generation=2)
        await report(office, A, commit_report(again), first=FIRST + 50)
        assert (await counters(office)).rounds_rolled_back == 4, "what was trained anew stands"
        await found_again(office, session=3, version=1)
        assert (await losses(office))[1] == (0, 3, 2, 1, 1, 256), "and is lost anew, the older ones only once"
        assert (await counters(office)).rounds_rolled_back == 5


async def test_losses_are_means_over_tokens(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await ready_office(office)
        evaluated = closing(
            office.manifest, 4, num_eval=4, done=b"\xff", loss_sum=1280.0, eval_loss_sum=512.0, eval_tokens=256
        )
        await report(office, A, closing_report(sign_closing(A, evaluated)))
        (tally,) = await office.services.database.run(tallies.round_tallies)
        assert (tally.round, tally.loss, tally.heldout_loss, tally.heldout_tokens) == (4, 5.0, 2.0, 256)
        assert await office.services.database.run(tallies.is_evaluated, RoundId(4))
        assert not await office.services.database.run(tallies.is_evaluated, RoundId(0))


async def test_throughput_is_measured_by_the_peers_clocks(tmp_path: Path) -> None:
    """Oracle: 256 tokens a round, peers say 2 s and once 4 s; that all of it arrives at one moment is no matter."""
    async with open_office(tmp_path) as office:
        await ready_office(office)
        assert await office.services.database.run(tallies.tokens_per_s) is None
        closings = [closing_report(sign_closing(A, closing(office.manifest, number))) for number in range(2)]
        await report(office, A, *closings, work(0, seconds=2.0), work(1, seconds=4.0))
        assert await office.services.database.run(tallies.tokens_per_s) == pytest.approx(512 / 6)


async def test_the_last_averaging_of_a_stage_is_its_newest_attempt(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await ready_office(office)
        await report(
            office,
            A,
            averaging(0, 3, ballot=1, ok=False, reason="late"),
            averaging(0, 3, ballot=2, members=3, asked=4, bytes_sent=100, seconds=1.5, hidden_seconds=1.0),
            averaging(1, 2, ok=False, reason="nobody there", members=1, asked=2, bytes_sent=0, seconds=0.0),
        )
        await report(
            office, C, averaging(0, 3, ballot=2, members=3, asked=4, bytes_sent=50, bytes_received=7, seconds=1.0)
        )
        zero, one = await office.services.database.run(tallies.last_averagings)
        assert (zero.round, zero.ballot, zero.ok, zero.took_part, zero.asked) == (3, 2, True, 3, 4)
        assert (zero.bytes_sent, zero.bytes_received, zero.seconds) == (150, 1007, 1.5)
        assert zero.group == "03" * 32
        assert zero.hidden_share == pytest.approx(1.0 / 2.5)
        assert (one.ok, one.reason) == (False, "nobody there")


async def test_reports_that_cannot_be_believed_are_acknowledged_and_count_nothing(tmp_path: Path) -> None:
    """Each differs in one point from a report that is believed."""
    async with open_office(tmp_path) as office:
        await ready_office(office)
        run = office.manifest
        stranger = Volunteer("stranger")
        fine = sign_closing(A, closing(run, 0))
        forged = Signed(payload=closing(run, 1).to_bytes(), signer=fine.signer, signature=fine.signature)
        unbelievable: list[Report] = [
            closing_report(forged),
            closing_report(sign_closing(stranger, closing(run, 1))),
            closing_report(sign_closing(A, closing(run, 1, run="0" * 32))),
            closing_report(sign_closing(A, closing(run, 99))),
            closing_report(sign_closing(A, closing(run, 1, target_tokens=10**9))),
            closing_report(sign_closing(A, closing(run, 1, num_train=3, done=b"\x07"))),
            closing_report(seal(A.key, "another context", closing(run, 1))),
            commit_report(committed(office, fine, stranger)),
            commit_report(committed(office, fine, A, generation=2)),
            commit_report(committed(office, fine, A, run="0" * 32)),
            commit_report(committed(office, fine, A, stage=2)),
            commit_report(committed(office, fine, A, tokens_dropped=1 << 55)),
            commit_report(committed(office, fine, A, contributors=(Contribution(peer=A.peer, tokens=1, weight=2),))),
            averaging(2, 0),
            averaging(0, 99),
            averaging(0, 0, bytes_sent=(1 << 64) - 1),
            work(99),
            work(0, activation_bytes=(1 << 64) - 1),
        ]
        before = asdict(await counters(office))
        assert await report(office, A, *unbelievable) == FIRST + len(unbelievable) - 1
        assert asdict(await counters(office)) == before
        await report(office, A, closing_report(fine), first=FIRST + 100)
        assert (await counters(office)).tasks_done == 4


async def test_numbers_beyond_reason_are_refused_before_they_reach_the_database(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await ready_office(office)
        with pytest.raises(PeerFault, match="beyond reason"):
            await report(office, A, work(0), first=(1 << 64) - 1)


async def test_many_huge_but_possible_numbers_add_up_without_an_error(tmp_path: Path) -> None:
    """SQLite's SUM raises on overflow; the ledger must show something whatever a few peers claim."""
    async with open_office(tmp_path) as office:
        await ready_office(office)
        largest = (1 << 53) - 1
        for first in range(0, 1100, 50):
            await report(office, A, *[work(0, hops=largest)] * 50, first=FIRST + first)
        assert (await counters(office)).hops > largest
