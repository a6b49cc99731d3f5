"""A member's shards, read when they are needed: how often, how many are kept, and what becomes of errors.

Oracles: the reads, counted; for a whole reduce `reference`, as with tensors.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peer.averaging.parts import PART_ELEMENTS
from peer.averaging.reduce import SHARDS_AT_HAND, ReduceError, Shards
from protocol.errors import LocalFault, StorageError
from tests.peer.averaging.reduce_members import SHARDS, Member, joined, make_group, make_shards, reduce_all, reference

LENGTHS = (6, 4, 8, 5, 7)
PATIENCE_S = 5.0


class Disk:
    """Reads shards and counts that; holds reads up while `gate` is not set."""

    def __init__(self, shards: list[Tensor]) -> None:
        self.shards = shards
        self.reads: Counter[int] = Counter()
        self.threads: set[int] = set()
        self.errors: dict[int, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()

    def read(self, number: int) -> Tensor:
        self.reads[number] += 1
        self.threads.add(threading.get_ident())
        assert self.gate.wait(PATIENCE_S)
        if number in self.errors:
            raise self.errors[number]
        return self.shards[number].clone()

    def lazy(self) -> Shards:
        return Shards([len(shard) for shard in self.shards], self.read)


async def turns_until(condition: Callable[[], bool]) -> None:
    """Let the loop go round, and return at the first turn at which the condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - every turn counts
            await asyncio.sleep(0)


@pytest.fixture
def disk() -> Disk:
    return Disk([torch.arange(float(length)) + 10 * number for number, length in enumerate(LENGTHS)])


# -- reading ----------------------------------------------------------------------------------------------------------


async def test_nothing_is_read_before_it_is_wanted(disk: Disk) -> None:
    shards = disk.lazy()
    assert shards.lengths == LENGTHS
    assert not disk.reads
    part = await shards.part_soon(2, 3, 4)
    assert part.tolist() == [23.0, 24.0, 25.0, 26.0]
    assert disk.reads == {2: 1}


async def test_the_loop_is_not_held_up(disk: Disk) -> None:
    """Oracle: another task gets on while a read waits; the thread that reads is another one."""
    disk.gate.clear()
    reading = asyncio.create_task(disk.lazy().part_soon(0, 0, 1))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not reading.done()
    disk.gate.set()
    assert (await reading).tolist() == [0.0]
    assert threading.get_ident() not in disk.threads


async def test_all_parts_of_a_shard_take_one_read(disk: Disk) -> None:
    shards = disk.lazy()
    for start in range(4):
        await shards.part_soon(1, start, 1)
    assert disk.reads == {1: 1}


async def test_a_shard_that_several_want_at_once_is_read_once(disk: Disk) -> None:
    disk.gate.clear()
    shards = disk.lazy()
    waiting = [asyncio.create_task(shards.part_soon(3, start, 2)) for start in range(3)]
    await asyncio.sleep(0)
    disk.gate.set()
    assert [part.tolist() for part in await asyncio.gather(*waiting)] == [[30.0, 31.0], [31.0, 32.0], [32.0, 33.0]]
    assert disk.reads == {3: 1}
    assert not shards._reading


async def test_who_asks_just_as_a_read_ends_gets_it_too(disk: Disk) -> None:
    """Oracle: one read, though the first one who asked has not been told yet."""
    shards = disk.lazy()
    first = asyncio.create_task(shards.part_soon(0, 0, 1))
    await asyncio.sleep(0)
    await turns_until(lambda: not shards._reading)
    await shards.part_soon(0, 0, 1)
    await first
    assert disk.reads == {0: 1}


async def test_only_the_latest_few_stay_at_hand(disk: Disk) -> None:
    """Oracle: reads; what is asked for again in time costs none."""
    shards = disk.lazy()
    for number in range(SHARDS_AT_HAND):
        await shards.part_soon(number, 0, 1)
    for number in range(SHARDS_AT_HAND):
        await shards.part_soon(number, 1, 1)
    assert disk.reads == dict.fromkeys(range(SHARDS_AT_HAND), 1)
    await shards.part_soon(SHARDS_AT_HAND, 0, 1)
    assert len(shards._at_hand) == SHARDS_AT_HAND
    assert 0 not in shards._at_hand
    await shards.part_soon(0, 0, 1)
    assert disk.reads[0] == 2
    assert len(shards._at_hand) == SHARDS_AT_HAND


async def test_many_at_once_are_not_all_kept(disk: Disk) -> None:
    shards = disk.lazy()
    await asyncio.gather(*(shards.part_soon(number, 0, 1) for number in range(len(LENGTHS))))
    assert len(shards._at_hand) == SHARDS_AT_HAND
    assert not shards._reading


async def test_who_gives_up_does_not_stop_the_read_for_others(disk: Disk) -> None:
    disk.gate.clear()
    shards = disk.lazy()
    leaving, staying = (asyncio.create_task(shards.part_soon(4, 0, 2)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    disk.gate.set()
    assert (await staying).tolist() == [40.0, 41.0]
    assert disk.reads == {4: 1}


# -- errors -----------------------------------------------------------------------------------------------------------


async def test_an_error_reaches_all_who_wait_and_the_next_one_tries_again(disk: Disk) -> None:
    """Oracle: the very error; nothing of it stays."""
    error = disk.errors[1] = StorageError("the drive is gone")
    shards = disk.lazy()
    results = await asyncio.gather(*(shards.part_soon(1, 0, 1) for _ in range(3)), return_exceptions=True)
    assert results == [error] * 3
    assert disk.reads == {1: 1}
    disk.errors.clear()
    assert (await shards.part_soon(1, 0, 1)).tolist() == [10.0]


async def test_an_error_that_nobody_waits_for_is_nobodys_news(disk: Disk) -> None:
    """Oracle: no message of the loop about an exception that was never retrieved."""
    loop, heard = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: heard.append(context))
    disk.errors[0] = StorageError("the drive is gone")
    disk.gate.clear()
    shards = disk.lazy()
    leaving = asyncio.create_task(shards.part_soon(0, 0, 1))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    disk.gate.set()
    await turns_until(lambda: not shards._reading)
    for _ in range(3):
        await asyncio.sleep(0)
    assert heard == []


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(6, dtype=torch.float64),
        torch.zeros(6, dtype=torch.bfloat16),
        torch.zeros(5),
        torch.zeros(7),
        torch.zeros(2, 3),
        torch.zeros(12)[::2],
    ],
    ids=["fp64", "bf16", "short", "long", "not flat", "strided"],
)
async def test_what_is_no_shard_is_refused(wrong: Tensor) -> None:
    """A bug of ours: it must not become numbers for others. Oracle: ValueError, now and soon, and nothing is kept."""
    shards = Shards([6], lambda number: wrong)
    with pytest.raises(ValueError, match="flat contiguous fp32"):
        shards.part(0, 0, 1)
    with pytest.raises(ValueError, match="flat contiguous fp32"):
        await shards.part_soon(0, 0, 1)
    assert not shards._at_hand


def test_tensors_are_shards_as_they_are() -> None:
    """Oracle: the memory itself."""
    tensors = [torch.arange(4.0), torch.empty(0)]
    shards = Shards.of(tensors)
    assert shards.lengths == (4, 0)
    assert shards.part(0, 1, 2).data_ptr() == tensors[0][1:].data_ptr()
    assert len(shards.part(1, 0, 0)) == 0


# -- in a reduce ------------------------------------------------------------------------------------------------------

real = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("no_task_left_behind")]


async def reduce_lazily(members: list[Member], disks: list[Disk], name: str) -> list[object]:
    group = make_group(members, name)
    work = (member.reduce.reduce(group, disk.lazy()) for member, disk in zip(members, disks, strict=True))
    return list(await asyncio.gather(*work, return_exceptions=True))


class TestInAReduce:
    pytestmark = real

    @pytest.mark.parametrize("name", ["fp32", "int8"])
    @pytest.mark.parametrize("number", [1, 2, 3])
    async def test_lazy_shards_sum_to_the_same_bytes(self, swarm: list[Member], number: int, name: str) -> None:
        """Oracle: `reference`, and the same members with tensors. A shard without elements is not even read, and the
        others once or, if members are far out of step, not much more often."""
        members, inputs = swarm[:number], [make_shards(seed) for seed in range(number)]
        disks = [Disk(shards) for shards in inputs]
        lazy = await reduce_lazily(members, disks, name)
        with_tensors = await reduce_all(members, make_group(members, name), inputs)
        expected = b"".join(reference(name, inputs))
        for ours, theirs in zip(lazy, with_tensors, strict=True):
            assert isinstance(ours, BaseException) is False, ours
            assert joined(ours) == joined(theirs) == expected  # type: ignore[arg-type]
        for disk in disks:
            assert disk.reads.keys() == {index for index, length in enumerate(SHARDS) if length}
            assert disk.reads.total() <= len(SHARDS) * number

    async def test_a_member_whose_disk_fails_says_so_and_is_named_by_the_others(self, swarm: list[Member]) -> None:
        """Oracle: its own StorageError, long before a timeout; ReduceError with its name at the others."""
        inputs = [make_shards(seed, (3 * PART_ELEMENTS, 1000)) for seed in range(3)]
        disks = [Disk(shards) for shards in inputs]
        disks[1].errors[1] = StorageError("the drive is gone")
        results = await reduce_lazily(swarm[:3], disks, "fp32")
        assert isinstance(results[1], LocalFault)
        assert "the drive is gone" in str(results[1])
        for result in (results[0], results[2]):
            assert isinstance(result, ReduceError)
            assert result.peer == swarm[1].peer
