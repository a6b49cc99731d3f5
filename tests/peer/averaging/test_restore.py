"""Where a stage's first state comes from, also when this machine cannot take it for now. All around it is played.

Oracle: the error, which the session waits after or ends with, and what the engine is told.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peer.averaging.restore import Restorer
from peer.averaging.sync import Place
from peer.engine.local_checkpoint import Standing
from peer.memory.disk.wear import WriteBudgetSpent
from protocol.control import Snapshot
from protocol.errors import StorageError, UnreachableError
from protocol.ids import Lineage, PeerId, RoundId, StageId, Version
from protocol.transport.blobs import MissingBlobError

SPENT = WriteBudgetSpent("today's writes are spent.", resumes_in_s=60.0)


class Case:
    def __init__(self, fault: Exception) -> None:
        self.faults: list[Exception] = []
        self.num_fetched = 0

        async def fail(*_: object, **__: object) -> None:
            raise fault

        async def fetch(*_: object, **__: object) -> bytes:
            self.num_fetched += 1
            raise MissingBlobError("none yet")

        self.restorer = Restorer(
            StageId(0),
            sync=cast(Any, SimpleNamespace(from_members=fail, start_over=fail)),
            own_disk=cast(Any, None),
            history=cast(Any, None),
            engine=cast(
                Any,
                SimpleNamespace(
                    engines={0: SimpleNamespace(version=0)},
                    resumed={},
                    note_fault=self._note_fault,
                    pause=lambda: "a pause" if self.faults else None,
                ),
            ),
            compute=cast(Any, None),
            blobs=cast(Any, SimpleNamespace(fetch=fetch)),
            coordinator=PeerId("coordinator"),
        )

    def _note_fault(self, error: Exception) -> bool:
        is_one = isinstance(error, (WriteBudgetSpent, MemoryError))
        self.faults += [error] * is_one
        return is_one


@pytest.mark.parametrize("fault", [SPENT, MemoryError("full")], ids=repr)
async def test_a_state_that_cannot_be_taken_for_now_is_waited_for(fault: Exception) -> None:
    case = Case(fault)
    with pytest.raises(UnreachableError, match="pause"):
        await case.restorer.from_members([PeerId("anne")])
    assert case.faults == [fault]
    with pytest.raises(UnreachableError, match="pause"):
        await case.restorer.from_scratch(allow_initial=True)
    assert case.num_fetched == 0, "nothing more is begun before the pause"


async def test_initial_weights_that_cannot_be_drawn_for_now_are_waited_for() -> None:
    case = Case(SPENT)
    with pytest.raises(UnreachableError, match="pause"):
        await case.restorer.from_scratch(allow_initial=True)
    assert case.faults == [SPENT]


@pytest.mark.parametrize("fault", [StorageError("full disk"), RuntimeError("a bug")], ids=repr)
async def test_what_no_pause_helps_goes_through(fault: Exception) -> None:
    case = Case(fault)
    with pytest.raises(type(fault)):
        await case.restorer.from_members([PeerId("anne")])


class Returned:
    """A peer that has come back with state on its own drive; what the drive and the coordinator have is played."""

    def __init__(
        self, *, own: Place | None, standing: Standing | None, checkpoint: int | None = None, spoils: bool = False
    ) -> None:
        """With `spoils`, the attempt to load the own state leaves nothing of it in the engine."""
        self.did: list[object] = []
        self._own, self._checkpoint, self._standing, self._spoils = own, checkpoint, standing, spoils
        engine = SimpleNamespace(version=Version(9))
        self.restorer = Restorer(
            StageId(0),
            sync=cast(
                Any,
                SimpleNamespace(
                    own_standing=lambda: self._standing,
                    start_over=self._start_over,
                    from_checkpoint=self._from_checkpoint,
                ),
            ),
            own_disk=cast(Any, SimpleNamespace(go_on=self._go_on)),
            history=cast(Any, None),
            engine=cast(Any, SimpleNamespace(engines={0: engine}, resumed={0: STANDING}, pause=lambda: None)),
            compute=cast(Any, SimpleNamespace(run=self._keep)),
            blobs=cast(Any, SimpleNamespace(fetch=self._fetch)),
            coordinator=PeerId("coordinator"),
        )

    async def _go_on(self, *, least: Version) -> Place | None:
        self.did.append(("own disk", least))
        if self._spoils:
            self._standing = None
        return self._own

    async def _start_over(self) -> None:
        self.did.append("start over")

    async def _keep(self, *_: object, **__: object) -> None:
        self.did.append("keep")

    async def _from_checkpoint(self, snapshot: Snapshot, *, source: PeerId, folder: str) -> Place:
        self.did.append(("checkpoint", snapshot.version))
        return PLACE

    async def _fetch(self, *_: object, **__: object) -> bytes:
        if self._checkpoint is None:
            raise MissingBlobError("none yet")
        entry = {"stage": 0, "version": self._checkpoint, "lineage": "00" * 32, "files": []}
        return json.dumps({"round": self._checkpoint, "stages": [entry]}).encode()


STANDING = Standing(Version(9), RoundId(9), Lineage(bytes(32)))
PLACE = Place(charter=None, commits=(), round=RoundId(9), version=Version(9), lineage=Lineage(bytes(32)))


@pytest.mark.parametrize("checkpoint", [None, 4])
async def test_the_own_disk_goes_before_the_checkpoint_and_is_measured_by_it(checkpoint: int | None) -> None:
    """Oracle: what was asked for, and that nothing else was touched."""
    case = Returned(own=PLACE, standing=STANDING, checkpoint=checkpoint)
    assert await case.restorer.from_scratch(allow_initial=True) is PLACE
    assert case.did == [("own disk", checkpoint or 0)]


async def test_without_an_own_state_that_counts_the_checkpoint_is_taken() -> None:
    case = Returned(own=None, standing=STANDING, checkpoint=4)
    assert await case.restorer.from_scratch(allow_initial=False) is PLACE
    assert case.did == [("own disk", 4), ("checkpoint", 4)]


@pytest.mark.parametrize("spoils", [False, True])
async def test_an_own_state_that_is_history_does_not_keep_a_run_from_its_beginning(spoils: bool) -> None:
    """No checkpoint, and the charter is of version 0. Oracle: the initial weights, also if it could not be loaded."""
    case = Returned(own=None, standing=STANDING, spoils=spoils)
    assert (await case.restorer.from_scratch(allow_initial=True)).version == 0
    assert case.did == [("own disk", 0), "start over", "keep"]


async def test_what_was_followed_half_way_is_not_thrown_away_for_initial_weights() -> None:
    """It came from members, over what was found on the disk when the process started. Oracle: the session waits."""
    case = Returned(own=None, standing=None)
    with pytest.raises(UnreachableError, match="no checkpoint"):
        await case.restorer.from_scratch(allow_initial=True)
    assert "start over" not in case.did


@pytest.mark.parametrize(("checkpoint", "is_outdated"), [(None, False), (9, False), (10, True)])
async def test_a_checkpoint_ahead_outdates_a_state(checkpoint: int | None, is_outdated: bool) -> None:
    """Oracle: the coordinator's rule in `founding.py`: what is as new as its checkpoint may still be founded on."""
    case = Returned(own=PLACE, standing=STANDING, checkpoint=checkpoint)
    assert await case.restorer.is_outdated(Version(9)) is is_outdated


async def test_a_silent_coordinator_outdates_nothing() -> None:
    case = Returned(own=PLACE, standing=STANDING, checkpoint=10)

    async def silence(*_: object, **__: object) -> bytes:
        raise UnreachableError("away")

    case.restorer._blobs = cast(Any, SimpleNamespace(fetch=silence))
    assert not await case.restorer.is_outdated(Version(9))
