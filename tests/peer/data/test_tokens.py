"""peer/data/tokens.py: no token is used before its chunk was verified, whatever sources and disks do."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from peer.data.tokens import PARALLEL_FETCHES, Fetched, TokenFile
from protocol.errors import PeerFault, StorageError, UnreachableError
from protocol.ids import Digest, digest
from protocol.manifest import TokenFileSpec
from protocol.tokens import index_bytes

T = 16
CHUNK = 128  # bytes: 64 tokens, four windows
TOKENS = np.arange(1000, 2000, dtype="<u2")  # 16 chunks, the last one of 80 bytes
RAW = TOKENS.tobytes()


def _index() -> bytes:
    pieces = [RAW[start : start + CHUNK] for start in range(0, len(RAW), CHUNK)]
    return index_bytes(Digest(hashlib.sha256(piece).digest()) for piece in pieces)


SPEC = TokenFileSpec(
    name="train.bin", num_tokens=len(TOKENS), bytes_per_token=2, chunk_bytes=CHUNK, index_digest=digest(_index())
)


class Source:
    """A coordinator in memory; `spoil` changes the chunks it sends, `hold` keeps it waiting."""

    def __init__(self) -> None:
        self.asked: Counter[int] = Counter()
        self.index_asked = 0
        self.index = _index()
        self.spoil: Callable[[int, bytes], bytes] = lambda chunk, data: data
        self.hold: Callable[[], Awaitable[None]] | None = None
        self.at_once = self.most_at_once = 0

    async def fetch_chunk(self, file: str, chunk: int, *, fits: Callable[[bytes], bool]) -> Fetched:
        assert file == "train.bin"
        self.asked[chunk] += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await (self.hold() if self.hold else asyncio.sleep(0))
        finally:
            self.at_once -= 1
        return Fetched(self.spoil(chunk, RAW[chunk * CHUNK : (chunk + 1) * CHUNK]), "peer-seven")

    async def fetch_index(self, file: str, *, fits: Callable[[bytes], bool]) -> Fetched:
        assert file == "train.bin"
        self.index_asked += 1
        return Fetched(self.index, "peer-seven")


async def _open(directory: Path, source: Source) -> TokenFile:
    return await TokenFile.open(SPEC, directory, sequence_length=T, source=source)


async def test_windows_are_the_tokens_and_the_same_shifted_by_one(tmp_path: Path) -> None:
    """Oracle: slices of the array; windows 3 and 7 end with the first token of the next chunk."""
    file = await _open(tmp_path, Source())
    wanted = [3, 61, 7]
    await file.ensure(wanted)
    inputs, labels = file.windows(wanted)
    assert inputs.dtype == labels.dtype == np.int64
    assert inputs.shape == labels.shape == (3, T)
    for row, window in enumerate(wanted):
        np.testing.assert_array_equal(inputs[row], TOKENS[window * T : window * T + T])
        np.testing.assert_array_equal(labels[row], TOKENS[window * T + 1 : window * T + T + 1])


async def test_only_the_chunks_that_are_needed_are_fetched_and_each_once(tmp_path: Path) -> None:
    """Oracle: by hand; windows 0-2 lie in chunk 0, window 3 ends with the first token of chunk 1."""
    source = Source()
    file = await _open(tmp_path, source)
    await file.ensure([0, 1, 2])
    assert source.asked == {0: 1}
    await file.ensure([3, 0])
    assert source.asked == {0: 1, 1: 1}
    assert file.statistics().bytes_fetched == 2 * CHUNK


async def test_two_callers_at_once_fetch_a_chunk_once(tmp_path: Path) -> None:
    """Oracle: the source's own count."""
    source = Source()
    file = await _open(tmp_path, source)
    await asyncio.gather(file.ensure([0, 5]), file.ensure([5, 0]), file.ensure([1]))
    assert set(source.asked.values()) == {1}


async def test_many_chunks_are_fetched_side_by_side_but_not_all_at_once(tmp_path: Path) -> None:
    """Oracle: the source sees at most `PARALLEL_FETCHES` questions at a time, and reaches that number."""
    source = Source()
    file = await _open(tmp_path, source)
    await file.ensure(range(62))
    assert source.most_at_once == PARALLEL_FETCHES
    assert len(source.asked) == SPEC.num_chunks


async def test_a_wrong_chunk_is_a_fault_of_its_sender_and_asked_for_again(tmp_path: Path) -> None:
    """Oracle: the error names the source; nothing of it is used; an honest answer heals."""
    source = Source()
    file = await _open(tmp_path, source)
    source.spoil = lambda chunk, data: data[:5] + bytes([data[5] ^ 1]) + data[6:] if chunk == 1 else data
    with pytest.raises(PeerFault, match=r"peer-seven sent a wrong chunk 1 of train\.bin"):
        await file.ensure([0, 4])
    with pytest.raises(AssertionError):
        file.windows([4])
    source.spoil = lambda chunk, data: data
    await file.ensure([0, 4])
    np.testing.assert_array_equal(file.windows([4])[0][0], TOKENS[64:80])


@pytest.mark.parametrize("spoiled", [b"", RAW[:CHUNK] + b"x", RAW[: CHUNK - 1], bytes(CHUNK)])
async def test_chunks_of_another_length_or_content_are_refused(tmp_path: Path, spoiled: bytes) -> None:
    """Oracle: none of these is chunk 0."""
    source = Source()
    source.spoil = lambda chunk, data: spoiled
    file = await _open(tmp_path, source)
    with pytest.raises(PeerFault):
        await file.ensure([0])
    assert file.statistics().chunks_held == 0


async def test_an_error_of_the_source_comes_through_as_it_is(tmp_path: Path) -> None:
    """Oracle: one plain `UnreachableError`, not a group, even when several fetches fail together."""
    source = Source()

    async def nobody() -> None:
        raise UnreachableError("nobody has it")

    source.hold = nobody
    file = await _open(tmp_path, source)
    with pytest.raises(UnreachableError, match="nobody has it"):
        await file.ensure(range(62))


async def test_a_wrong_index_is_a_fault_of_its_sender(tmp_path: Path) -> None:
    """Oracle: the manifest's digest; the bad index is not kept."""
    source = Source()
    source.index = _index()[::-1]
    with pytest.raises(PeerFault, match="peer-seven sent a wrong index"):
        await _open(tmp_path, source)
    source.index = _index()
    await _open(tmp_path, source)
    assert source.index_asked == 2


async def test_a_restart_fetches_nothing_again(tmp_path: Path) -> None:
    """Oracle: a second source that is asked for nothing, not even the index."""
    first = await _open(tmp_path, Source())
    await first.ensure(range(62))
    first.close()
    source = Source()
    second = await _open(tmp_path, source)
    await second.ensure(range(62))
    assert source.index_asked == 0
    assert not source.asked
    np.testing.assert_array_equal(second.windows([20])[0][0], TOKENS[320:336])


async def test_a_byte_flipped_on_disk_is_found_on_first_use_after_a_start(tmp_path: Path) -> None:
    """Oracle: exactly the damaged chunk is fetched again, it is logged, and the tokens are right."""
    first = await _open(tmp_path, Source())
    await first.ensure(range(62))
    first.close()
    path = tmp_path / "train.bin"
    damaged = bytearray(path.read_bytes())
    damaged[2 * CHUNK + 9] ^= 0x10
    path.write_bytes(damaged)
    source = Source()
    second = await _open(tmp_path, source)
    await second.ensure([0])
    assert not source.asked
    with capture_logs() as logs:
        await second.ensure([8, 9])
    assert source.asked == {2: 1}
    assert [(entry["event"], entry["chunk"]) for entry in logs] == [("tokens.damaged", 2)]
    np.testing.assert_array_equal(second.windows([8])[0][0], TOKENS[128:144])
    assert path.read_bytes() == RAW


@pytest.mark.parametrize("name", ["train.bin", "train.have", "train.index"])
async def test_a_file_lost_or_cut_between_starts_costs_a_fetch_and_nothing_else(tmp_path: Path, name: str) -> None:
    """Oracle: the tokens are right afterwards, whichever of the three files was cut short."""
    first = await _open(tmp_path, Source())
    await first.ensure(range(62))
    first.close()
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    second = await _open(tmp_path, Source())
    await second.ensure(range(62))
    inputs, _ = second.windows(range(62))
    np.testing.assert_array_equal(inputs.ravel(), TOKENS[: 62 * T])


async def test_a_bitmap_that_promises_too_much_is_not_believed(tmp_path: Path) -> None:
    """Oracle: a crash may keep the bitmap and lose the data; every chunk is then found wanting and fetched."""
    (tmp_path / "train.have").write_bytes(b"\xff\xff")
    source = Source()
    file = await _open(tmp_path, source)
    await file.ensure([0])
    assert source.asked == {0: 1}
    assert file.statistics().chunks_damaged == 1


async def test_the_cache_is_sparse_until_it_is_filled(tmp_path: Path) -> None:
    """Oracle: the file has its full length at once and takes no blocks."""
    file = await _open(tmp_path, Source())
    status = (tmp_path / "train.bin").stat()
    assert status.st_size == len(RAW)
    assert status.st_blocks == 0
    assert file.statistics().chunks_held == 0


async def test_chunks_are_served_only_when_held_and_sound(tmp_path: Path) -> None:
    """Oracle: what another peer would get: the bytes, or nothing; never damaged ones."""
    file = await _open(tmp_path, Source())
    assert file.read_chunk(0) is None
    await file.ensure([0])
    assert file.read_chunk(0) == RAW[:CHUNK]
    assert file.read_chunk(1) is None
    assert file.read_chunk(-1) is None
    assert file.read_chunk(10**6) is None
    assert file.read_index() == _index()
    with (tmp_path / "train.bin").open("r+b") as raw:
        raw.write(b"!")
    assert file.read_chunk(0) is None


async def test_a_cancelled_wait_leaves_the_file_usable(tmp_path: Path) -> None:
    """Oracle: the same windows come right afterwards; a lock left behind would hang the second call."""
    source = Source()
    started = asyncio.Event()

    async def wait_forever() -> None:
        started.set()
        await asyncio.Event().wait()

    source.hold = wait_forever
    file = await _open(tmp_path, source)
    waiting = asyncio.create_task(file.ensure([0]))
    await started.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    source.hold = None
    async with asyncio.timeout(5):
        await file.ensure([0])
    np.testing.assert_array_equal(file.windows([0])[0][0], TOKENS[:T])


async def test_a_chunk_that_arrives_after_the_end_is_dropped(tmp_path: Path) -> None:
    """Oracle: closing twice and storing late raise nothing; the descriptor may be somebody else's by then."""
    source = Source()
    file = await _open(tmp_path, source)
    release = asyncio.Event()

    async def wait_for_release() -> None:
        await release.wait()

    source.hold = wait_for_release
    waiting = asyncio.create_task(file.ensure([0]))
    await asyncio.sleep(0)
    file.close()
    file.close()
    release.set()
    await waiting
    assert (tmp_path / "train.bin").read_bytes() == bytes(len(RAW))


async def test_a_directory_that_cannot_be_written_is_a_fault_of_this_machine(tmp_path: Path) -> None:
    """Oracle: a data directory below a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot keep tokens"):
        await _open(tmp_path / "file" / "data", Source())


async def test_a_full_disk_is_a_fault_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: ENOSPC on the write becomes one `StorageError`; with room again everything goes on."""
    source = Source()
    file = await _open(tmp_path, source)

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        with pytest.raises(StorageError, match="No space left"):
            await file.ensure([0])
    await file.ensure([0])
    assert file.read_chunk(0) == RAW[:CHUNK]


async def test_four_byte_tokens_keep_their_value(tmp_path: Path) -> None:
    """Oracle: ids above 65,535, which two bytes could not hold."""
    tokens = np.arange(70_000, 70_000 + 64, dtype="<u4")
    raw = tokens.tobytes()
    index = index_bytes([Digest(hashlib.sha256(raw).digest())])
    spec = TokenFileSpec(
        name="heldout.bin", num_tokens=64, bytes_per_token=4, chunk_bytes=1 << 20, index_digest=digest(index)
    )

    class Wide:
        async def fetch_chunk(self, file: str, chunk: int, *, fits: Callable[[bytes], bool]) -> Fetched:
            return Fetched(raw, "coordinator")

        async def fetch_index(self, file: str, *, fits: Callable[[bytes], bool]) -> Fetched:
            return Fetched(index, "coordinator")

    file = await TokenFile.open(spec, tmp_path, sequence_length=T, source=Wide())
    await file.ensure([2])
    np.testing.assert_array_equal(file.windows([2])[1][0], tokens[33:49])
