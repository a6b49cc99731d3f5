"""Audits as a service: what is drawn, who recomputes it, and what is kept of it.

Everything is real but tensors, the network and the time. Oracles: rows in SQLite, bans, balances, beats.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from coordinator.audit.lookout import CONTRARY, NONSENSE
from coordinator.audit.office import MAX_PER_ROUND, OFF, QUIET_S, SPOILT
from coordinator.audit.policy import State, state_of
from coordinator.audit.sums import GATHER_S
from coordinator.store import audits, bans, credits, history
from protocol.audits import ContributionReport, NonsenseReport, ShareOrder, ShareReport, contribution_seed
from protocol.control import BeatReply, ReceiptReport, Report
from protocol.handover import hand_over
from protocol.ids import Lineage, RoundId, StageId
from protocol.manifest import AveragingMode, AveragingSpec
from protocol.receipts import Hop
from protocol.rounds.lineage import next_lineage
from protocol.rounds.messages import Commit, Contribution, Credit
from protocol.signing import Signed
from protocol.sketch import ShardSketch, Values, folded, scaled, sketch, summed
from tests.coordinator.audit.people import Person, named, tensor
from tests.coordinator.office import (
    NO_LINEAGE,
    START_WALL_S,
    Office,
    StoppedTime,
    Volunteer,
    closing,
    closing_report,
    commit,
    open_office,
    sign_closing,
    state,
)
from tests.protocol.hops import hop, signed_window
from tests.protocol.manifests import batch_spec, manifest

FEEDER, WORKER, SECOND, THIRD = (Volunteer(name) for name in ("feeder", "worker", "second", "third"))
EVERYBODY = (FEEDER, WORKER, SECOND, THIRD)
TOKENS = 64
NUMBERS = 4
RUN = manifest(batch=batch_spec(num_rounds=50, eval_every=1000))


class Crew:
    """The feeder of stage 0 and three replicas of stage 1, of two; they answer what they are asked."""

    def __init__(self, office: Office, **lies: bool) -> None:
        self.office = office
        self.people = {who.peer: Person(who.peer, lies=lies.get(who.name, False)) for who in EVERYBODY}
        self._sequences = dict.fromkeys((who.name for who in EVERYBODY), 0)

    async def enter(self) -> None:
        for who in EVERYBODY:
            await self.office.join(who, wanted_stages=(StageId(int(who is not FEEDER)),))
            await self.beat(who)

    async def beat(self, who: Volunteer, *reports: Report) -> BeatReply:
        numbered = []
        for report in reports:
            self._sequences[who.name] += 1
            numbered.append((self._sequences[who.name], report))
        return await self.office.beat(who, state(int(who is not FEEDER)), reports=numbered)

    async def work(self, round_id: int, *, worker: Volunteer = WORKER, how: str = "honest") -> None:
        """Report a round in which the worker did everything at stage 1; if it is mute it says nothing of it."""
        done = closing(RUN, round_id).model_copy(
            update={
                "credits": tuple(
                    Credit(stage=StageId(stage), peer=who.peer, tokens=NUMBERS * TOKENS)
                    for stage, who in enumerate((FEEDER, worker))
                )
            }
        )
        hops = [
            replace(
                hop(number, FEEDER.peer, worker.peer, given=named("x"), returned=named("dx")),
                local_step=int(how == "unsteady"),
            )
            for number in range(NUMBERS)
        ]
        await self.beat(FEEDER, closing_report(sign_closing(FEEDER, done)), self._window(FEEDER, round_id, hops))
        if how != "mute":
            await self.beat(worker, self._window(worker, round_id, hops))

    async def settle(self, beats: int = 6) -> None:
        """Let everybody who is not out answer what it is asked, until nothing is."""
        for _ in range(beats):
            await self.office.tick(1.0)
            for who in EVERYBODY:
                if self.office.services.bans.refusal(who.peer) is not None:
                    continue
                reply = await self.beat(who)
                answers = self.people[who.peer].answers(reply)
                if answers:
                    await self.beat(who, *answers)
        await self.office.tick(1.0)

    def state_of(self, who: Volunteer) -> State:
        standing = self.office.services.audits.standing(who.peer)
        return state_of(standing, now_s=self.office.services.clock.wall())

    async def findings(self) -> dict[str, dict[str, int]]:
        found = await self.office.services.database.run(audits.count_findings)
        return {who.name: found[who.peer] for who in EVERYBODY if who.peer in found}

    @staticmethod
    def _window(who: Volunteer, round_id: int, hops: Sequence[Hop]) -> Report:
        return ReceiptReport(window=signed_window(who.key, *hops, run=RUN.run_id, round_id=round_id))


async def test_honest_work_is_looked_at_and_earns_trust_that_outlives_a_restart(tmp_path: Path) -> None:
    time = StoppedTime()
    async with open_office(tmp_path, time=time, run=RUN) as office:
        crew = Crew(office)
        await crew.enter()
        for round_id in range(6):
            await crew.work(round_id)
            await crew.settle()
        found = (await crew.findings())["worker"]
        assert set(found) == {"valid"}
        assert found["valid"] >= 20
        assert crew.state_of(WORKER) is State.TRUSTED
    async with open_office(tmp_path, time=time, run=RUN) as office:
        assert Crew(office).state_of(WORKER) is State.TRUSTED


async def test_who_sends_nonsense_is_put_out_by_two_witnesses_and_loses_what_it_held(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN) as office:
        crew = Crew(office)
        await crew.enter()
        for person in crew.people.values():
            person.sent = {"dx": "nonsense"}
        await crew.work(0)
        await office.tick(6.0)  # credits are booked
        assert (await office.services.database.run(credits.balances))[WORKER.peer].held_tokens == NUMBERS * TOKENS
        for _ in range(4):
            await office.tick(1.0)
            for who in (FEEDER, SECOND, THIRD):
                reply = await crew.beat(who)
                answers = crew.people[who.peer].answers(reply)
                await crew.beat(who, *answers)
        await office.tick(1.0)
        assert crew.state_of(WORKER) is State.QUARANTINED
        assert (await crew.findings())["worker"]["confirmed"] >= 1
        (row,) = await office.services.database.run(lambda db: bans.load_bans(db, now_s=office.services.clock.wall()))
        assert row.peer == WORKER.peer
        assert "two others recomputed" in row.reason
        assert (await office.services.database.run(credits.balances))[WORKER.peer].held_tokens == 0
        events = await office.services.database.run(lambda db: history.last_events(db, limit=50))
        assert "peer.quarantined" in {event.kind for event in events}
        assert all(crew.state_of(who) in (State.NEW, State.PROBATION) for who in (FEEDER, SECOND, THIRD))
        # an appeal is granted: it is back, with its credits, and everything is looked at again
        await office.services.database.run(bans.remove_ban, WORKER.peer)
        await office.tick(1.0)
        assert crew.state_of(WORKER) is State.NEW or crew.state_of(WORKER) is State.PROBATION
        assert (await office.services.database.run(credits.balances))[WORKER.peer].held_tokens == NUMBERS * TOKENS
        await office.tick(6.0)
        assert (await office.services.database.run(credits.balances))[WORKER.peer].held_tokens == NUMBERS * TOKENS


async def test_work_that_is_a_little_off_is_put_out_once_it_is_so_in_another_round(tmp_path: Path) -> None:
    """Up to twice the tolerance it may be a microbatch like no other. Oracle: standings and credits."""
    async with open_office(tmp_path, run=RUN) as office:
        crew, states = Crew(office), []
        await crew.enter()
        for person in crew.people.values():
            person.tensors = {"dx": tensor("dx") + np.float32(0.045) * tensor("noise")}
        for round_id in range(2):
            await crew.work(round_id)
            await crew.settle()
            states.append(crew.state_of(WORKER))
            held = (await office.services.database.run(credits.balances))[WORKER.peer].held_tokens
            assert (held > 0) is (round_id == 0)
        assert states == [State.SUSPECT, State.QUARANTINED]
        (row,) = await office.services.database.run(lambda db: bans.load_bans(db, now_s=office.services.clock.wall()))
        assert OFF in row.reason


async def test_a_lying_auditor_is_doubted_and_the_honest_worker_is_not_touched(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN) as office:
        crew = Crew(office, second=True)
        await crew.enter()
        for round_id in range(4):
            await crew.work(round_id)
            await crew.settle()
        assert "confirmed" not in (await crew.findings())["worker"]
        assert crew.state_of(WORKER) in (State.PROBATION, State.TRUSTED)
        assert crew.state_of(SECOND) is State.SUSPECT  # one witness only: nobody is put out by one
        assert await office.services.database.run(lambda db: bans.load_bans(db, now_s=0.0)) == []


async def test_without_a_second_replica_nobody_is_put_out(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN) as office:
        crew = Crew(office)
        for who in (FEEDER, WORKER, SECOND):
            await office.join(who, wanted_stages=(StageId(int(who is not FEEDER)),))
            await crew.beat(who)
        for person in crew.people.values():
            person.sent = {"dx": "nonsense"}
        await crew.work(0)
        for _ in range(4):
            await office.tick(1.0)
            for who in (FEEDER, SECOND):
                reply = await crew.beat(who)
                answers = crew.people[who.peer].answers(reply)
                await crew.beat(who, *answers)
        await office.tick(1.0)
        assert crew.state_of(WORKER) is State.SUSPECT
        assert await office.services.database.run(lambda db: bans.load_bans(db, now_s=0.0)) == []


async def test_no_more_is_drawn_than_auditors_can_do(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN) as office:
        crew = Crew(office)
        await crew.enter()
        for round_id in range(8):
            await crew.work(round_id)
        await office.tick(1.0)
        asked = [len((await crew.beat(who)).audits) for who in EVERYBODY]
        assert 0 < max(asked) <= 5  # four that wait, and a second opinion
        assert asked[1] == 0  # nobody is asked about itself
        assert asked[0] == 0  # nor about a stage that it does not have
        assert sum(asked) <= MAX_PER_ROUND


async def test_a_peer_that_answers_what_it_was_not_asked_changes_nothing(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN) as office:
        crew = Crew(office)
        await crew.enter()
        await crew.work(0)
        await office.tick(1.0)
        asked = [(who, orders) for who in (SECOND, THIRD) if (orders := (await crew.beat(who)).audits)]
        assert asked
        for who, orders in asked:
            await crew.beat(WORKER, *(crew.people[WORKER.peer].answer(order) for order in orders))
            assert (await crew.beat(who)).audits == orders


async def test_what_is_known_of_a_key_is_known_of_its_successor(tmp_path: Path) -> None:
    """Strikes and trust go along, a lone witness stays one; nobody audits what it did itself under another key."""
    time, new, again = StoppedTime(), Volunteer("new"), Volunteer("again")
    async with open_office(tmp_path, time=time, run=RUN) as office:
        crew = Crew(office, second=True)
        await crew.enter()
        for round_id in range(4):
            await crew.work(round_id)
            await crew.settle()
        audits_office = office.services.audits
        before = audits_office.standing(SECOND.peer)
        assert before.accusers
        for old, young in ((SECOND, new), (new, again)):
            chain = [hand_over(SECOND.key, new.peer, issued_s=START_WALL_S)]
            if young is again:
                chain.append(hand_over(new.key, again.peer, issued_s=START_WALL_S))
            for session in (1, 2):  # it is shown at every registration
                await office.join(young, handovers=tuple(chain), session=session)
            assert audits_office.standing(old.peer) == audits_office.standing(young.peer)
            assert audits_office.standing(young.peer).accusers == before.accusers
        (accuser,) = before.accusers
        accusing = next(who for who in EVERYBODY if who.peer == accuser)
        moved = Volunteer("moved")
        await office.join(moved, handovers=(hand_over(accusing.key, moved.peer, issued_s=START_WALL_S),))
        assert audits_office.standing(again.peer).accusers == {moved.peer}
    async with open_office(tmp_path, time=time, run=RUN) as office:
        kept = office.services.audits
        assert kept.standing(SECOND.peer) == kept.standing(again.peer)
        assert kept.standing(again.peer).accusers == {moved.peer}
        assert set(await office.services.database.run(audits.load_standings)).isdisjoint({SECOND.peer, new.peer})


async def test_who_finds_right_what_two_others_find_wrong_is_looked_at_closely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four replicas one sends nonsense, and one covers for it. Oracle: standings; the credits that are left."""
    secrets = SimpleNamespace(token_bytes=random.Random(1).randbytes)  # so that it is asked at all
    monkeypatch.setattr("coordinator.audit.office.secrets", secrets)
    fourth = Volunteer("fourth")
    async with open_office(tmp_path, run=RUN) as office:
        crew = Crew(office)
        crew.people[fourth.peer], crew._sequences[fourth.name] = Person(fourth.peer), 0
        await crew.enter()
        await office.join(fourth, wanted_stages=(StageId(1),))
        await crew.beat(fourth)
        for person in crew.people.values():
            person.sent = {"dx": "nonsense"}
        crew.people[SECOND.peer].covers = True
        await crew.work(0)
        for _ in range(12):
            await office.tick(1.0)
            for who in (FEEDER, SECOND, THIRD, fourth):
                if office.services.bans.refusal(who.peer) is None:
                    await crew.beat(who, *crew.people[who.peer].answers(await crew.beat(who)))
        assert crew.state_of(WORKER) is State.QUARANTINED
        assert crew.state_of(SECOND) is State.SUSPECT, "a neighbour may have told it something else"
        assert all(crew.state_of(who) is not State.QUARANTINED for who in (FEEDER, THIRD, fourth))
        found = await office.services.database.run(audits.count_findings)
        assert found[WORKER.peer].get("valid", 0) >= 1, "it was covered for"
        await office.tick(6.0)
        balances = await office.services.database.run(credits.balances)
        assert balances.get(WORKER.peer, credits.Balance()).held_tokens == 0


@pytest.mark.parametrize("how", ["mute", "unsteady", "honest"])
async def test_who_hides_its_work_is_put_out_in_the_end(tmp_path: Path, how: str) -> None:
    """It signs paths, or nobody would be credited, but no receipts; or says that nobody could do it again. Oracle:
    standings; it takes minutes, as receipts may be late."""
    async with open_office(tmp_path, run=RUN) as office:
        crew = Crew(office)
        await crew.enter()
        rounds = iter(range(40))
        states = []
        for _ in range(18):
            round_id = next(rounds)
            await crew.work(round_id, worker=SECOND)
            if office.services.bans.refusal(WORKER.peer) is None:
                await crew.work(next(rounds), how=how)
            for _ in range(5):
                await office.tick(10.0)
                for who in EVERYBODY:
                    if office.services.bans.refusal(who.peer) is None:
                        await crew.beat(who, *crew.people[who.peer].answers(await crew.beat(who)))
            states.append(crew.state_of(WORKER))
        assert (State.SUSPECT in states) is (how != "honest")
        assert (states[-1] is State.QUARANTINED) is (how != "honest")
        assert all(crew.state_of(who) is not State.QUARANTINED for who in (FEEDER, SECOND, THIRD))


async def test_whom_most_of_its_neighbours_refuse_is_put_out(tmp_path: Path) -> None:
    """Three of three feeders, in two rounds each. Oracle: standings; the one whom only a liar accuses is left alone."""
    feeders = [Volunteer(name) for name in ("f1", "f2", "f3")]
    async with open_office(tmp_path, run=RUN) as office:
        for who in (*feeders, WORKER, SECOND):
            await office.join(who, wanted_stages=(StageId(int(who not in feeders)),))
        for sequence in range(1, 8):
            for number, who in enumerate(feeders):
                about = SECOND if number == 0 and sequence % 2 else WORKER
                report = NonsenseReport(peer=about.peer, round=RoundId(sequence))
                await office.beat(who, state(0), reports=[(sequence, report)])
            for who in (WORKER, SECOND):
                if office.services.bans.refusal(who.peer) is None:
                    await office.beat(who, state(1))
            await office.tick(9.0)
        rows = await office.services.database.run(lambda db: bans.load_bans(db, now_s=office.services.clock.wall()))
        assert [(row.peer, NONSENSE in row.reason) for row in rows] == [(WORKER.peer, True)]


# -- averages ------------------------------------------------------------------------------------------------


GIVERS = (WORKER, SECOND, THIRD)


def _recorded(under: Signed, **made: Any) -> Iterator[tuple[Commit, Lineage, bytes]]:
    """Yield commits of stage 1 of which contributions are on record, with their seeds."""
    for number in range(64):
        each = commit(RUN, 1, under, parent=NO_LINEAGE, norm=float(number), **made)
        lineage = next_lineage(each.parent, each.to_bytes())
        seed = contribution_seed(lineage)
        if seed is not None:
            yield each, lineage, seed


class Average:
    """A commit of three on record, each of which adds up a third; one makes something else of its share."""

    def __init__(self, *, poisoned: bool = False, which: int = 0) -> None:
        under = sign_closing(FEEDER, closing(RUN, 0))
        group = tuple(Contribution(peer=who.peer, tokens=TOKENS, weight=TOKENS) for who in GIVERS)
        recorded = _recorded(under, members=GIVERS, contributors=group)
        self.commit, self.lineage, self.seed = next(islice(recorded, which, None))
        self.poison = tensor("poison") if poisoned else 0 * tensor("poison")

    def given(self, who: Volunteer, share: int) -> bytes:
        return self._sketch(tensor(f"{who.name} to {share}"), share)

    def total(self, share: int) -> bytes:
        """The worker adds up the first share."""
        honest = [self.given(who, share) for who in GIVERS]
        return summed([*honest, self._sketch(self.poison, 0)] if share == 0 else honest)

    def contribution(self, who: Volunteer) -> ContributionReport:
        return ContributionReport(
            stage=StageId(1),
            round=self.commit.round,
            lineage=self.lineage,
            own=summed(self.given(who, share) for share in range(3)),
            total=summed(self.total(share) for share in range(3)),
        )

    def shares(self, who: Volunteer, order: ShareOrder) -> ShareReport:
        own = GIVERS.index(who)
        return ShareReport(
            order=order.order,
            given=tuple(folded(self.given(who, share)) for share in range(3)),
            taken=tuple(folded(self.given(giver, own)) for giver in GIVERS),
            totals=tuple(folded(self.total(share)) for share in range(3)),
        )

    def _sketch(self, values: Values, share: int) -> bytes:
        made = ShardSketch(self.seed)
        made.add(share, values)
        return made.packed()


async def said_of(average: Average, crew: Crew) -> None:
    """Enter, and let all three say what they gave."""
    await crew.enter()
    crew.office.services.audits.hear_commit(average.commit, average.lineage)
    for who in GIVERS:
        await crew.beat(who, average.contribution(who))
    await crew.office.tick(GATHER_S + 1.0)


@pytest.mark.parametrize("poisoned", [False, True])
async def test_who_makes_something_else_of_an_average_is_put_out(tmp_path: Path, poisoned: bool) -> None:
    """If it adds up nobody is even asked. Oracle: standings, the ban, and that it is told why."""
    async with open_office(tmp_path, run=RUN) as office:
        crew, average = Crew(office), Average(poisoned=poisoned)
        await said_of(average, crew)
        for who in GIVERS:
            reply = await crew.beat(who)
            assert len(reply.shares) == poisoned
            for order in reply.shares:
                await crew.beat(who, average.shares(who, order))
            assert (await crew.beat(who)).shares == ()
        await office.tick(1.0)
        rows = await office.services.database.run(lambda db: bans.load_bans(db, now_s=office.services.clock.wall()))
        assert [row.peer for row in rows] == [WORKER.peer] * poisoned
        assert all(SPOILT in row.reason for row in rows)
        assert (crew.state_of(WORKER) is State.QUARANTINED) is poisoned
        assert all(crew.state_of(who) is State.NEW for who in (SECOND, THIRD))


async def test_of_two_that_contradict_each_other_both_are_looked_at_closely(tmp_path: Path) -> None:
    """The worker says that another has sent the poison. Oracle: nobody is put out; two are suspects, one is not."""
    async with open_office(tmp_path, run=RUN) as office:
        crew, average = Crew(office), Average(poisoned=True)
        await said_of(average, crew)
        for who in GIVERS:
            (order,) = (await crew.beat(who)).shares
            report = average.shares(who, order)
            if who is WORKER:
                laid = summed((report.taken[1], folded(average._sketch(average.poison, 0))))
                report = report.model_copy(update={"taken": (report.taken[0], laid, report.taken[2])})
            await crew.beat(who, report)
        await office.tick(1.0)
        assert [crew.state_of(who) for who in GIVERS] == [State.SUSPECT, State.SUSPECT, State.NEW]


@pytest.mark.parametrize("how", ["unsteady", "silent neighbour"])
async def test_a_wrong_sum_of_which_a_part_is_hidden(tmp_path: Path, how: str) -> None:
    """Of four microbatches one cannot be looked at, and the worker's sum is the others' turned.

    A neighbour may have sent something odd and hide that: all who could have done it are suspects, and nobody is
    struck. Oracle: standings after each round.
    """
    async with open_office(tmp_path, run=RUN) as office:
        crew, states, tokens = Crew(office), [], NUMBERS * TOKENS
        await crew.enter()
        for round_id in range(2):
            hops = [hop(n, FEEDER.peer, WORKER.peer, given=named("x"), returned=named("dx")) for n in range(NUMBERS)]
            if how == "unsteady":
                hops[-1] = replace(hops[-1], local_step=1)
            heard = hops[:-1] if how == "silent neighbour" else hops
            under = sign_closing(FEEDER, closing(RUN, round_id))
            await crew.beat(FEEDER, closing_report(under), crew._window(FEEDER, round_id, heard))
            alone = (Contribution(peer=WORKER.peer, tokens=tokens, weight=tokens),)
            made, lineage, seed = next(_recorded(under, members=(WORKER,), contributors=alone))
            turned = sketch(-tensor("sum"), seed)
            given = ContributionReport(stage=StageId(1), round=made.round, lineage=lineage, own=turned, total=turned)
            office.services.audits.hear_commit(made, lineage)
            await crew.beat(WORKER, crew._window(WORKER, round_id, hops), given)
            await office.tick(GATHER_S + 1.0)
            await crew.settle()
            states.append((crew.state_of(WORKER), crew.state_of(FEEDER)))
    feeder = State.SUSPECT if how == "silent neighbour" else State.NEW
    assert states == [(State.SUSPECT, feeder)] * 2


async def test_when_the_run_goes_back_nobody_is_judged_by_other_weights(tmp_path: Path) -> None:
    """The same rounds come again. Oracle: what was asked is asked no more, and for a minute nothing new is."""
    async with open_office(tmp_path, run=RUN) as office:
        crew = Crew(office)
        await crew.enter()
        await crew.work(0)
        await office.tick(1.0)
        asked = [who for who in (SECOND, THIRD) if (await crew.beat(who)).audits]
        assert asked
        office.services.audits.forget()
        await crew.work(1)
        for _ in range(3):
            await office.tick(1.0)
            assert not any([(await crew.beat(who)).audits for who in (SECOND, THIRD)])
        for _ in range(int(QUIET_S)):
            await office.tick(1.0)
            for who in EVERYBODY:
                await crew.beat(who)
        await crew.work(2)
        await office.tick(1.0)
        assert any([(await crew.beat(who)).audits for who in (SECOND, THIRD)])


async def test_who_never_says_what_it_gives_is_put_out_in_the_end(tmp_path: Path) -> None:
    """Of an average of which one says nothing nothing is known. Oracle: standings; minutes pass, as a peer may lag."""
    async with open_office(tmp_path, run=RUN) as office:
        crew, states = Crew(office), []
        await crew.enter()
        for number in range(20):
            average = Average(which=number)
            office.services.audits.hear_commit(average.commit, average.lineage)
            for who in (WORKER, THIRD):
                await crew.beat(who, average.contribution(who))
            for _ in range(4):
                await office.tick(9.0)
                for who in EVERYBODY:
                    if office.services.bans.refusal(who.peer) is None:
                        await crew.beat(who)
            states.append(crew.state_of(SECOND))
        assert State.SUSPECT in states
        assert states[-1] is State.QUARANTINED
        assert all(crew.state_of(who) is State.NEW for who in (WORKER, THIRD))


class Drift(Average):
    """A mean of three drifts that have much in common, but for the worker's if it is turned."""

    def __init__(self, *, which: int, is_turned: bool) -> None:
        super().__init__(which=which)
        self._sign = -1 if is_turned else 1

    def given(self, who: Volunteer, share: int) -> bytes:
        values = tensor(f"common to {share}") + tensor(f"{who.name} to {share} in {self.seed!r}")
        return self._sketch(values * self._sign if who is WORKER else values, share)

    def total(self, share: int) -> bytes:
        return scaled(summed(self.given(who, share) for who in GIVERS), 1 / 3)


@pytest.mark.parametrize("is_turned", [False, True])
async def test_whose_drift_goes_against_all_others_is_put_out_in_the_end(tmp_path: Path, is_turned: bool) -> None:
    """It says truly what it gives, so all of it adds up. Oracle: standings, the reason, and what it has earned."""
    run = manifest(
        batch=batch_spec(num_rounds=50, eval_every=1000),
        averaging=AveragingSpec(mode=AveragingMode.DILOCO, codec="fp32", activation_codec="fp32"),
    )
    async with open_office(tmp_path, run=run) as office:
        crew = Crew(office)
        await crew.enter()
        for number in range(16):
            average = Drift(which=number, is_turned=is_turned)
            office.services.audits.hear_commit(average.commit, average.lineage)
            for who in GIVERS:
                if office.services.bans.refusal(who.peer) is None:
                    await crew.beat(who, average.contribution(who))
            for _ in range(4):
                await office.tick(9.0)
                for who in EVERYBODY:
                    if office.services.bans.refusal(who.peer) is None:
                        await crew.beat(who)
        rows = await office.services.database.run(lambda db: bans.load_bans(db, now_s=office.services.clock.wall()))
        assert [row.peer for row in rows] == [WORKER.peer] * is_turned
        assert all(CONTRARY in row.reason for row in rows)
        assert all(crew.state_of(who) is State.NEW for who in (SECOND, THIRD))
        if not is_turned:
            return
        # an appeal is granted: what it was put out for is not held against it at the next look
        await office.services.database.run(bans.remove_ban, WORKER.peer)
        await office.tick(1.0)
        await office.join(WORKER, wanted_stages=(StageId(1),), session=2)
        for _ in range(8):
            await office.tick(9.0)
            for who in EVERYBODY:
                await crew.beat(who)
        assert crew.state_of(WORKER) is State.PROBATION
