"""The status document: what is known, in one shape; what is not, as null; on a terminal, as lines.

Oracles: reports put in by hand; the fields that `swarm status --json` promises.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from coordinator.monitor import local
from coordinator.monitor.render import num_bytes, render
from coordinator.status import Document, answer, document, envelope
from protocol.control import STATUS_SCHEMA, Leave, PeerState, StatusAnswer
from protocol.errors import IncompatibleError
from protocol.transport.asking import read_answer
from tests.coordinator.office import (
    Office,
    Volunteer,
    averaging,
    closing,
    closing_report,
    open_office,
    sign_closing,
    state,
    work,
)

A, B, C = Volunteer("a"), Volunteer("b"), Volunteer("c")


async def status(office: Office) -> dict[str, Any]:
    await office.services.registry.save()
    now_s = office.services.clock.wall()
    return await office.services.database.run(document, office.manifest, now_s=now_s)


async def test_before_anybody_came_everything_unknown_is_null(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        found = await status(office)
        assert found["state"] == "waiting"
        unknown = ("round", "loss", "loss_first", "heldout", "tokens_per_s")
        assert {found[name] for name in unknown} == {None}
        assert [stage["replicas"] for stage in found["stages"]] == [[], []]
        assert found["ledger"]["tasks_lost"] == 0
        assert (found["ledger"]["rounds_rolled_back"], found["rollbacks"]) == (0, [])
        assert "?" in "\n".join(render(found))


async def test_a_training_run_shows_who_does_what_and_how_it_goes(tmp_path: Path) -> None:
    async with open_office(tmp_path, start_peers=3) as office:
        for number, volunteer in enumerate((A, B, C)):
            await office.join(volunteer)
            await office.beat(volunteer, state(number % 2))
        await office.tick()
        lineages = [office.charter_lineage(stage) for stage in (0, 1)]
        evaluated = closing(office.manifest, 4, num_eval=4, done=b"\xff", eval_loss_sum=256 * 3.0, eval_tokens=256)
        reports = (
            (1, closing_report(sign_closing(A, closing(office.manifest, 3, loss_sum=256 * 6.0)))),
            (2, closing_report(sign_closing(A, evaluated))),
            (3, averaging(0, 4, members=2, asked=3, bytes_sent=2048, seconds=0.25)),
            (4, work(4, seconds=0.5, target_tokens=128)),
        )
        await office.beat(A, state(0, lineage=lineages[0], members=2, round=5, version=5), reports=reports)
        await office.beat(B, state(1, lineage=lineages[1], members=1, round=5, version=5), reason="charter")
        await office.services.registry.leave(C.peer, Leave(reason="stopped"))
        found = await status(office)
    assert (found["state"], found["round"], found["rounds_closed"], found["num_rounds"]) == ("training", 5, 2, 10)
    assert (found["loss_first"], found["loss"]) == (6.0, 5.0)
    assert found["heldout"] == {"round": 4, "loss": 3.0, "bits_per_byte": 3.0 / math.log(2), "tokens": 256}
    assert found["tokens_per_s"] == 512.0
    zero, one = found["stages"]
    assert [replica["name"] for replica in zero["replicas"]] == ["a"]
    assert (zero["generation"], zero["version"], one["replicas"][0]["member"]) == (1, 5, True)
    assert (zero["last_averaging"]["took_part"], zero["last_averaging"]["asked"]) == (2, 3)
    assert one["last_averaging"] is None
    by_name = {peer["name"]: peer for peer in found["peers"]}
    assert by_name["b"]["reason"] == "charter"
    assert by_name["a"]["tokens"] == 128
    assert (by_name["c"]["presence"], by_name["c"]["state"]) == ("left", PeerState.STOPPED)
    text = "\n".join(render(found))
    assert "round      5 of 10  512 tok/s" in text
    assert "averaged 2 of 3, 2.0 KiB up, 1000 B down in 0.2 s, group 04040404" in text
    assert "2 here, 1 gone" in text
    assert "rolled back" not in text
    found["ledger"]["rounds_rolled_back"] = 3
    assert "0 dropped, 3 rounds rolled back" in "\n".join(render(found))


async def test_a_document_survives_the_network(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await office.join(A)
        found = await status(office)
    assert read_answer(answer(found)) == json.loads(json.dumps(found))
    assert json.loads(envelope(found)) == {"schema": STATUS_SCHEMA, "ok": True, "data": json.loads(json.dumps(found))}


async def test_a_swarm_too_large_for_a_message_is_shown_without_its_peers(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await office.join(A)
        found = await status(office)
    found["peers"] = found["peers"] * 2000
    short = read_answer(answer(found))
    assert (short["peers"], short["peers_omitted"]) == ([], 2000)


async def test_anybodys_questions_cost_one_look_and_wait_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a count of the looks; the thread that stores reports is held up for as long as the answers take."""
    looks = 0

    def counting(*arguments: Any, **options: Any) -> Document:
        nonlocal looks
        looks += 1
        return document(*arguments, **options)

    monkeypatch.setattr(local, "document", counting)
    monkeypatch.setattr(local, "FRESH_S", 3600.0)
    answered = threading.Event()
    async with open_office(tmp_path) as office:
        storing = asyncio.create_task(office.services.database.run(lambda db: answered.wait(30.0)))
        answers = await asyncio.gather(*(office.services.status() for _ in range(50)))
        assert not storing.done()
        answered.set()
        assert await storing
    assert looks == 1
    assert {read_answer(answer)["run"] for answer in answers} == {office.manifest.run_id}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"schema": "swarm.status/2", "data": {}}', '{"schema": "swarm.status/1"}']
)
def test_an_answer_that_cannot_be_read_is_one_clear_error(text: str) -> None:
    with pytest.raises(IncompatibleError):
        read_answer(StatusAnswer(document=text))


async def test_what_is_wrong_is_shown_until_it_is_not(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        office.services.journal.note("checkpoint", "round 5: disk full")
        await office.tick()
        assert (await status(office))["notes"]["checkpoint"] == "round 5: disk full"
        office.services.journal.clear("checkpoint")
        await office.tick()
        assert "checkpoint" not in (await status(office))["notes"]


async def test_strangers_words_cannot_control_the_terminal(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await office.join(A)
        await office.beat(A, state(0), reason="\x1b[2Jgone\n")
        found = await status(office)
    text = "".join(render(found))
    assert "\x1b" not in text
    assert "[2Jgone" in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5.0 TiB")]
)
def test_bytes_are_written_in_iec_units(count: int, text: str) -> None:
    assert num_bytes(count) == text
