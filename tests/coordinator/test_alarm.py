"""Jumps of the held-out loss. Oracles: rows in SQLite, the journal, and what was wished for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from coordinator.alarm import LOOK_EVERY_S, Jump, find_jump
from coordinator.rollback import WISH
from coordinator.store import history, peers
from protocol.ids import RoundId
from tests.coordinator.office import Office, Volunteer, closing, closing_report, open_office, sign_closing, state
from tests.coordinator.runs import random_weights, stage_files
from tests.protocol.manifests import batch_spec, manifest

A = Volunteer("a")
RUN = manifest(batch=batch_spec(num_rounds=50, eval_every=1000))


def losses(*values: float) -> list[tuple[RoundId, float]]:
    return [(RoundId(10 * number), loss) for number, loss in enumerate(values)]


@pytest.mark.parametrize(
    "quiet",
    [
        (),
        (3.0, 3.0),
        (3.0, 3.0, 9.0, 9.0),  # too little to compare with
        (5.0, 4.0, 3.5, 3.2, 3.1),
        (3.0, 3.0, 3.0, 3.0, 9.0),  # one may be a lie
        (3.0, 3.0, 3.0, 9.0, 3.0),
        (3.0, 3.0, 3.0, 3.5, 3.5),
    ],
)
def test_a_training_that_goes_well_raises_no_alarm(quiet: tuple[float, ...]) -> None:
    assert find_jump(losses(*quiet)) is None


def test_a_loss_that_rises_and_stays_there_is_a_jump() -> None:
    assert find_jump(losses(3.2, 3.1, 3.0, 4.0, 3.9)) == Jump(RoundId(30), RoundId(20), 3.1, 3.9)
    assert find_jump(losses(3.2, 3.1, 3.0, math.nan, math.inf)) is not None
    later = find_jump(losses(3.2, 3.1, 3.0, 4.0, 3.9, 4.1))
    assert later is not None
    assert later.last_good == 20, "of a bad one nobody should go on from"


async def train(office: Office, folder: Path, *values: float) -> None:
    """Report evaluated rounds with these losses, and a checkpoint of round 2."""
    await office.join(A)
    run = office.services.run
    files = stage_files(folder / "fetched", random_weights(run.manifest), version=2)
    run.write_checkpoint(RoundId(2), files)
    for number, loss in enumerate(values):
        done = closing(office.manifest, number).model_copy(update={"eval_loss_sum": 64 * loss, "eval_tokens": 64})
        report = closing_report(sign_closing(A, done))
        await office.beat(A, state(0), reports=[(number + 1, report)])
    await office.tick(LOOK_EVERY_S)


@pytest.mark.parametrize("auto", [False, True])
async def test_a_jump_is_told_once_and_the_run_goes_back_only_if_that_is_wanted(tmp_path: Path, auto: bool) -> None:
    async with open_office(tmp_path, run=RUN, auto_rollback=auto) as office:
        await train(office, tmp_path, 3.2, 3.1, 3.0, 3.0, 8.0, 8.0)
        for _ in range(3):
            await office.beat(A, state(0))
            await office.services.alarm.tick()
            office.time.advance(LOOK_EVERY_S)
        events = await office.services.database.run(lambda db: history.last_events(db, limit=50))
        assert [each.detail for each in events if each.kind == "loss.jumped"] == [
            "held-out loss went from 3.050 to 8.000 at round 4"
        ]
        assert "coordinator rollback DIR --to 2" in office.services.journal.notes["loss"]
        wish = await office.services.database.run(peers.get_setting, WISH)
        went_back = [each.kind for each in events if each.kind == "run.rolled_back"]
        assert bool(wish or went_back) is auto
        assert wish is None or json.loads(wish)["round"] == 2


async def test_without_a_checkpoint_before_it_there_is_nowhere_to_go(tmp_path: Path) -> None:
    async with open_office(tmp_path, run=RUN, auto_rollback=True) as office:
        await train(office, tmp_path, 3.2, 3.1, 3.0, 3.0, 8.0, 8.0)
        office.services.run.checkpoints.set_aside_after(RoundId(0))
        office.services.alarm._told = None
        office.time.advance(LOOK_EVERY_S)
        await office.services.database.run(peers.drop_setting, WISH)
        await office.services.alarm.tick()
        assert "no checkpoint before that" in office.services.journal.notes["loss"]
        assert await office.services.database.run(peers.get_setting, WISH) is None
