"""The organiser's watchers: whom they look at, what their word counts, and that they are no part of the swarm.

Everything is real but tensors, the network and the time. Oracles: rows in SQLite, bans, balances, beats.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.audit import auditors
from coordinator.audit.policy import State, state_of
from coordinator.settings import read_settings
from coordinator.store import audits, bans
from protocol.control import BeatReply, ReceiptReport, Report
from protocol.errors import ConfigError, RefusedError
from protocol.ids import StageId
from protocol.manifest import AveragingSpec
from tests.coordinator.audit.people import Person, named
from tests.coordinator.office import Office, Volunteer, closing, closing_report, open_office, sign_closing, state
from tests.protocol.hops import hop, signed_window
from tests.protocol.manifests import batch_spec, manifest

FEEDER, WORKER, SECOND, OWL, HAWK = (Volunteer(name) for name in ("feeder", "worker", "second", "owl", "hawk"))
RUN = manifest(batch=batch_spec(num_rounds=50, eval_every=1000))
NUMBERS = 4


class Crew:
    """The feeder of stage 0, a worker at stage 1 of two, and a watcher that follows both."""

    def __init__(self, office: Office, *others: Volunteer, watchers: tuple[Volunteer, ...] = (OWL,)) -> None:
        self.office = office
        self.hosts, self.watchers = (FEEDER, WORKER, *others), watchers
        self.people = {who.peer: Person(who.peer) for who in (*self.hosts, *watchers)}
        self._sequences = dict.fromkeys(self.people, 0)

    async def enter(self) -> None:
        for who in self.hosts:
            await self.office.join(who, wanted_stages=(StageId(int(who is not FEEDER)),))
            await self.beat(who)
        for who in self.watchers:
            await self.office.join(who, watches=True)
            await self.beat(who)

    async def beat(self, who: Volunteer, *reports: Report) -> BeatReply:
        numbered = []
        for report in reports:
            self._sequences[who.peer] += 1
            numbered.append((self._sequences[who.peer], report))
        stages = (0, 1) if who in self.watchers else (int(who is not FEEDER),)
        return await self.office.beat(who, *map(state, stages), reports=numbered)

    async def work(self, round_id: int) -> None:
        """Report a round in which the worker did everything at stage 1."""
        hops = [hop(number, FEEDER.peer, WORKER.peer, given=named("x"), returned=named("dx")) for number in range(4)]
        await self.beat(FEEDER, closing_report(sign_closing(FEEDER, closing(RUN, round_id))))
        for who in (FEEDER, WORKER):
            if who in self.present():
                window = signed_window(who.key, *hops, run=RUN.run_id, round_id=round_id)
                await self.beat(who, ReceiptReport(window=window))

    async def settle(self, beats: int = 6, *, seconds: float = 1.0) -> None:
        """Let everybody who is not out answer what it is asked, in so many beats of so many seconds."""
        for _ in range(beats):
            await self.office.tick(seconds)
            for who in self.present():
                answers = self.people[who.peer].answers(await self.beat(who))
                if answers:
                    await self.beat(who, *answers)
        await self.office.tick(1.0)

    def present(self) -> list[Volunteer]:
        return [who for who in (*self.hosts, *self.watchers) if self.state_of(who) is not State.QUARANTINED]

    def state_of(self, who: Volunteer) -> State:
        standing = self.office.services.audits.standing(who.peer)
        return state_of(standing, now_s=self.office.services.clock.wall())

    async def findings(self, who: Volunteer) -> dict[str, int]:
        return (await self.office.services.database.run(audits.count_findings)).get(who.peer, {})


async def test_it_looks_at_stages_of_one_replica_and_its_word_is_enough_to_keep_what_they_earn(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        crew = Crew(office)
        await crew.enter()
        for round_id in range(14):
            await crew.work(round_id)
            await crew.settle(8)
        for who in (FEEDER, WORKER):
            assert set(await crew.findings(who)) == {"valid"}
            assert crew.state_of(who) is State.TRUSTED
        standing = office.services.audits.standing(WORKER.peer)
        assert set(standing.vouched_s) == {OWL.peer}


async def test_who_never_does_right_is_put_out_once_the_watcher_has_found_others_right_for_a_while(
    tmp_path: Path,
) -> None:
    """Before that it may itself be what is broken: one that finds everybody wrong puts out nobody."""
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        crew = Crew(office)
        await crew.enter()
        crew.people[OWL.peer].sent = {"dx": "nonsense"}  # the worker's gradients, and not what the feeder sends
        crew.people[OWL.peer].lies = True  # of the feeder's activations it finds something else as well
        for round_id in range(6):
            await crew.work(round_id)
            await crew.settle(12, seconds=5.0)
        assert (await crew.findings(WORKER))["confirmed"] > 1
        assert {crew.state_of(who) for who in (FEEDER, WORKER)} == {State.SUSPECT}
        crew.people[OWL.peer].lies = False
        for round_id in range(6, 16):
            await crew.work(round_id)
            await crew.settle(12, seconds=5.0)
        assert crew.state_of(WORKER) is State.QUARANTINED
        assert crew.state_of(FEEDER) is not State.QUARANTINED
        # an appeal is granted: it takes as long again
        await office.services.database.run(bans.remove_ban, WORKER.peer)
        await office.tick(1.0)
        await office.join(WORKER, wanted_stages=(StageId(1),), session=2)
        await crew.work(16)
        await crew.settle(12, seconds=5.0)
        assert crew.state_of(WORKER) is State.SUSPECT


async def test_it_looks_a_second_time_itself_with_weights_that_it_gets_anew(tmp_path: Path) -> None:
    """No other can speak for whom it has found wrong: that may be a friend. Oracle: who is asked, and for what."""
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        crew = Crew(office)
        await crew.enter()
        crew.people[OWL.peer].sent = {"dx": "nonsense", "y": "nonsense"}
        await crew.work(0)
        await office.tick(1.0)
        first = (await crew.beat(OWL)).audits[0]
        assert not first.is_fresh
        await office.join(SECOND, wanted_stages=(first.first_stage,))
        await office.beat(SECOND, state(first.first_stage))
        await crew.beat(OWL, crew.people[OWL.peer].answer(first))
        await office.tick(1.0)
        orders = (await crew.beat(OWL)).audits
        assert [(order.number, order.prefix) for order in orders if order.is_fresh] == [(first.number, first.prefix)]
        asked = (await office.beat(SECOND, state(first.first_stage))).audits
        assert first.number not in {order.number for order in asked}


async def test_of_two_watchers_that_contradict_each_other_neither_is_doubted(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer, HAWK.peer)) as office:
        crew = Crew(office, watchers=(OWL, HAWK))
        await crew.enter()
        crew.people[OWL.peer].lies = True
        for round_id in range(8):
            await crew.work(round_id)
            await crew.settle(12)
        assert "cleared" in {**await crew.findings(FEEDER), **await crew.findings(WORKER)}
        assert crew.state_of(OWL) is crew.state_of(HAWK) is State.NEW
        assert not await office.services.database.run(lambda db: bans.load_bans(db, now_s=0.0))


async def test_where_rounds_overlap_it_only_looks_at_work_whose_version_is_named(tmp_path: Path) -> None:
    """The feeder names none. Oracle: the stages that it is asked about."""
    spec = AveragingSpec(codec="fp32", activation_codec="fp32", overlap=True)
    run = manifest(batch=batch_spec(num_rounds=50, eval_every=1000), averaging=spec)
    async with open_office(tmp_path, run=run, watchers=(OWL.peer,)) as office:
        crew = Crew(office)
        await crew.enter()
        asked = set()
        for round_id in range(8):
            hops = [
                hop(number, FEEDER.peer, WORKER.peer, given=named("x"), returned=named("dx")) for number in range(4)
            ]
            for who in (FEEDER, WORKER):
                window = signed_window(who.key, *hops, run=run.run_id, round_id=round_id)
                await crew.beat(who, ReceiptReport(window=window))
            await office.tick(1.0)
            orders = (await crew.beat(OWL)).audits
            asked |= {order.first_stage for order in orders}
            await crew.beat(OWL, *map(crew.people[OWL.peer].answer, orders))
        assert asked == {1}


async def test_it_is_the_second_witness_where_there_is_one_other_replica(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        crew = Crew(office, SECOND)
        await crew.enter()
        for person in crew.people.values():
            person.sent = {"dx": "nonsense"}
        await crew.work(0)
        await crew.settle()
        assert crew.state_of(WORKER) is State.QUARANTINED, "one of the two is no watcher: that is enough at once"
        assert crew.state_of(SECOND) is not State.QUARANTINED


async def test_a_peer_that_lies_about_others_is_doubted_by_its_word(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        crew = Crew(office, SECOND)
        await crew.enter()
        crew.people[SECOND.peer] = Person(SECOND.peer, lies=True)
        for round_id in range(3):
            await crew.work(round_id)
            await crew.settle()
        assert crew.state_of(SECOND) is State.SUSPECT
        assert "confirmed" not in await crew.findings(WORKER)


@pytest.mark.parametrize("rate", [0.0, 1.0])
async def test_how_much_it_looks_at(tmp_path: Path, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stage has nothing that goes out: it is always done whole."""
    monkeypatch.setattr(auditors, "WHOLE_RATE", rate)
    monkeypatch.setattr(auditors, "PREFIX", 16)
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        crew = Crew(office)
        await crew.enter()
        for round_id in range(6):
            await crew.work(round_id)
        await office.tick(1.0)
        expected = {0: 16 if rate == 0.0 else None, 1: None}
        seen = set()
        for round_id in range(6, 20):
            orders = (await crew.beat(OWL)).audits
            assert 0 < len(orders) <= auditors.MAX_AT_WATCHER  # it may be slow
            assert all(order.prefix == expected[order.first_stage] for order in orders)
            seen |= {order.first_stage for order in orders}
            await crew.beat(OWL, *map(crew.people[OWL.peer].answer, orders))
            await crew.work(round_id)
            await office.tick(1.0)
        assert seen == {0, 1}


async def test_it_is_no_part_of_the_swarm(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,), start_peers=3) as office:
        crew = Crew(office)
        await crew.enter()
        registry = office.services.registry
        assert {peer.peer for peer in registry.live()} == {FEEDER.peer, WORKER.peer}
        assert [peer.peer for peer in registry.watching()] == [OWL.peer]
        assert all(host.peer != OWL.peer for host in registry.hosts())
        assert OWL.peer not in {member for _, member, _ in (await crew.beat(FEEDER)).members}
        await office.tick(60.0)
        assert registry.watching() == (), "silent for too long"


async def test_its_place_outlives_a_restart(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        await Crew(office).enter()
        await office.services.registry.save()
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        assert [peer.follows for peer in office.services.registry.watching()] == [(0, 1)]
    async with open_office(tmp_path, run=RUN) as office:  # it is named no more
        registry = office.services.registry
        assert registry.watching() == ()
        assert OWL.peer not in {peer.peer for peer in registry.live()}
        with pytest.raises(RefusedError, match="does not know you"):
            await office.beat(OWL, state(0))


async def test_its_key_as_a_replica_is_a_peer_like_others(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        await office.join(OWL, wanted_stages=(StageId(1),))
        assert office.services.registry.watchers == frozenset()
        assert [peer.peer for peer in office.services.registry.live()] == [OWL.peer]


async def test_only_who_is_named_may_watch_and_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN) as office:
        with pytest.raises(RefusedError, match="is no watcher of this run"):
            await office.join(OWL, watches=True)
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        with pytest.raises(RefusedError, match="none that it asks for"):
            await office.join(OWL, watches=True, wanted_stages=(StageId(7),))
    with pytest.raises(ConfigError, match=r"--watcher: .*'owl' is no peer id"):
        read_settings(watchers=("owl",))
