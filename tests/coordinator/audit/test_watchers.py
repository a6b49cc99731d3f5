"""The organiser's watchers: whom they look at, what their word counts, and that they are no part of the swarm.

Everything is real but tensors, the network and the time. Oracles: rows in SQLite, bans, balances, beats.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.audit import office as audit_office
from coordinator.audit.office import PREFIX
from coordinator.audit.policy import State, state_of
from coordinator.settings import read_settings
from coordinator.store import audits, credits
from protocol.control import BeatReply, ReceiptReport, Report
from protocol.errors import ConfigError, RefusedError
from protocol.ids import StageId
from tests.coordinator.audit.people import Person, named
from tests.coordinator.office import Office, Volunteer, closing, closing_report, open_office, sign_closing, state
from tests.protocol.hops import hop, signed_window
from tests.protocol.manifests import batch_spec, manifest

FEEDER, WORKER, SECOND, OWL = (Volunteer(name) for name in ("feeder", "worker", "second", "owl"))
RUN = manifest(batch=batch_spec(num_rounds=50, eval_every=1000))
NUMBERS = 4


class Crew:
    """The feeder of stage 0, a worker at stage 1 of two, and a watcher that follows both."""

    def __init__(self, office: Office, *others: Volunteer) -> None:
        self.office = office
        self.hosts = (FEEDER, WORKER, *others)
        self.people = {who.peer: Person(who.peer) for who in (*self.hosts, OWL)}
        self._sequences = dict.fromkeys(self.people, 0)

    async def enter(self) -> None:
        for who in self.hosts:
            await self.office.join(who, wanted_stages=(StageId(int(who is not FEEDER)),))
            await self.beat(who)
        await self.office.join(OWL, watches=True)
        await self.beat(OWL)

    async def beat(self, who: Volunteer, *reports: Report) -> BeatReply:
        numbered = []
        for report in reports:
            self._sequences[who.peer] += 1
            numbered.append((self._sequences[who.peer], report))
        stages = (0, 1) if who is OWL else (int(who is not FEEDER),)
        return await self.office.beat(who, *map(state, stages), reports=numbered)

    async def work(self, round_id: int) -> None:
        """Report a round in which the worker did everything at stage 1."""
        hops = [hop(number, FEEDER.peer, WORKER.peer, given=named("x"), returned=named("dx")) for number in range(4)]
        await self.beat(FEEDER, closing_report(sign_closing(FEEDER, closing(RUN, round_id))))
        for who in (FEEDER, WORKER):
            if who in self.present():
                window = signed_window(who.key, *hops, run=RUN.run_id, round_id=round_id)
                await self.beat(who, ReceiptReport(window=window))

    async def settle(self, beats: int = 6) -> None:
        """Let everybody who is not out answer what it is asked."""
        for _ in range(beats):
            await self.office.tick(1.0)
            for who in self.present():
                answers = self.people[who.peer].answers(await self.beat(who))
                if answers:
                    await self.beat(who, *answers)
        await self.office.tick(1.0)

    def present(self) -> list[Volunteer]:
        return [who for who in (*self.hosts, OWL) if self.state_of(who) is not State.QUARANTINED]

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
            await crew.settle()
        for who in (FEEDER, WORKER):
            assert set(await crew.findings(who)) == {"valid"}
            assert crew.state_of(who) is State.TRUSTED
        standing = office.services.audits.standing(WORKER.peer)
        assert set(standing.vouched_s) == {OWL.peer}


async def test_who_does_wrong_is_put_out_once_the_watcher_has_found_others_right_meanwhile(tmp_path: Path) -> None:
    """Before that it may itself be what is broken: one that finds everybody wrong puts out nobody."""
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        crew = Crew(office)
        await crew.enter()
        crew.people[OWL.peer].sent = {"dx": "nonsense"}  # the worker's gradients, and not what the feeder sends
        crew.people[OWL.peer].lies = True  # of the feeder's activations it finds something else as well
        for round_id in range(8):
            await crew.work(round_id)
            await crew.settle()
        assert (await crew.findings(WORKER))["confirmed"] > 1
        assert {crew.state_of(who) for who in (FEEDER, WORKER)} == {State.SUSPECT}
        crew.people[OWL.peer].lies = False
        for round_id in range(8, 16):
            await crew.work(round_id)
            await crew.settle()
        assert crew.state_of(WORKER) is State.QUARANTINED
        assert crew.state_of(FEEDER) is not State.QUARANTINED
        held = (await office.services.database.run(credits.balances)).get(WORKER.peer, credits.Balance())
        assert held.held_tokens == 0


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


async def test_a_peer_that_lies_about_others_is_doubted_and_the_watcher_never_is(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        crew = Crew(office, SECOND)
        await crew.enter()
        crew.people[SECOND.peer] = Person(SECOND.peer, lies=True)
        for round_id in range(3):
            await crew.work(round_id)
            await crew.settle()
        assert crew.state_of(SECOND) is State.SUSPECT
        assert "confirmed" not in await crew.findings(WORKER)
        assert crew.state_of(OWL) is State.NEW


@pytest.mark.parametrize("rate", [0.0, 1.0])
async def test_how_much_it_looks_at(tmp_path: Path, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stage has nothing that goes out: it is always done whole."""
    monkeypatch.setattr(audit_office, "WHOLE_RATE", rate)
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        crew = Crew(office)
        await crew.enter()
        for round_id in range(6):
            await crew.work(round_id)
        await office.tick(1.0)
        orders = (await crew.beat(OWL)).audits
        expected = {0: PREFIX if rate == 0.0 else None, 1: None}
        assert orders
        assert all(order.prefix == expected[order.first_stage] for order in orders)
        assert len(orders) <= audit_office.MAX_WAITING


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


async def test_only_who_is_named_may_watch_and_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN) as office:
        with pytest.raises(RefusedError, match="is no watcher of this run"):
            await office.join(OWL, watches=True)
    async with open_office(tmp_path, run=RUN, watchers=(OWL.peer,)) as office:
        with pytest.raises(RefusedError, match="none that it asks for"):
            await office.join(OWL, watches=True, wanted_stages=(StageId(7),))
    with pytest.raises(ConfigError, match=r"--watcher: .*'owl' is no peer id"):
        read_settings(watchers=("owl",))
