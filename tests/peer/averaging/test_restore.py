"""Where a stage's first state comes from, when this machine cannot take it for now. Everything around it is played.

Oracle: the error, which the session waits after or ends with, and what the engine is told.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from peer.averaging.restore import Restorer
from peer.memory.disk.wear import WriteBudgetSpent
from protocol.errors import StorageError, UnreachableError
from protocol.ids import PeerId, StageId
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
