"""A volunteer's copy of a token file: fetched chunk by chunk, verified, kept across restarts.

Owns: the promise that no token is used before its chunk has been hashed in this process. Must not know:
where chunks come from (a `ChunkSource` brings them and decides whom to ask next), rounds, torch. Used by
`peer/data/source.py`; the bytes lie in a `ChunkCache`, the format is `protocol/tokens.py`.

What an earlier process kept is hashed again on its first use, so neither a crash between two writes nor a
flipped bit on the disk needs any other care.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import structlog
from numpy.typing import NDArray

from peer.data.chunkcache import ChunkCache, storage_error
from protocol.errors import PeerFault, StorageError, SwarmError, WireError
from protocol.ids import digest
from protocol.manifest import TokenFileSpec
from protocol.tokens import ChunkIndex, chunk_range, chunks_of, window_range

log = structlog.get_logger()

PARALLEL_FETCHES = 4  # hides the round trip of a home link; more would only compete with activations
INDEX_SUFFIX = ".index"


@dataclass(frozen=True, slots=True)
class Fetched:
    """Bytes somebody sent, and who: a wrong hash must have a name."""

    data: bytes
    source: str


class ChunkSource(Protocol):
    """Where token bytes come from: the coordinator or any peer that holds them."""

    async def fetch_chunk(self, file: str, chunk: int, *, fits: Callable[[bytes], bool]) -> Fetched:
        """Bring one chunk of the token file called `file`, from the first source whose bytes fit."""
        ...

    async def fetch_index(self, file: str, *, fits: Callable[[bytes], bool]) -> Fetched:
        """Bring the index of the token file called `file`."""
        ...


@dataclass(frozen=True, slots=True)
class TokenFileStatistics:
    """What a token file has cost so far."""

    chunks_held: int
    chunks_total: int
    chunks_fetched: int
    chunks_damaged: int
    bytes_fetched: int


class TokenFile:
    """One token file of the run on this machine. Make it with `open`; use it from one event loop."""

    def __init__(self, index: ChunkIndex, cache: ChunkCache, *, sequence_length: int, source: ChunkSource) -> None:
        self.spec: TokenFileSpec = index.spec
        self._index = index
        self._cache = cache
        self._sequence_length = sequence_length
        self._source = source
        self._lock = asyncio.Lock()  # one caller fetches at a time; the next usually finds its chunks there
        self._verified: set[int] = set()
        self._fetched = self._damaged = self._bytes_fetched = 0

    @classmethod
    async def open(cls, spec: TokenFileSpec, directory: Path, *, sequence_length: int, source: ChunkSource) -> Self:
        """Open the cache of one token file, fetching its index if this machine does not have it yet.

        Raises `PeerFault` naming the source if the index is not the one in the manifest.
        """
        path = directory / spec.name
        index_path = path.with_suffix(INDEX_SUFFIX)
        index = await asyncio.to_thread(_kept_index, spec, index_path)
        if index is None:
            fetched = await source.fetch_index(spec.name, fits=lambda data: digest(data) == spec.index_digest)
            try:
                index = ChunkIndex.parse(spec, fetched.data)
            except WireError as error:
                raise PeerFault(f"{fetched.source} sent a wrong index: {error}") from error
            await asyncio.to_thread(_keep_index, index_path, fetched.data)
        return cls(index, ChunkCache(path, spec), sequence_length=sequence_length, source=source)

    async def ensure(self, windows: Iterable[int]) -> None:
        """Have the chunks of these windows here and verified.

        Raises `PeerFault` naming the source of a chunk with a wrong hash; calling again asks again.
        """
        await self._ensure_chunks(chunks_of(self.spec, windows, sequence_length=self._sequence_length))

    def windows(self, windows: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the inputs and labels of these windows, each (B, T); `ensure` them first."""
        rows = np.stack([self._tokens(window) for window in windows]).astype(np.int64)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def read_chunk(self, chunk: int) -> bytes | None:
        """Return a chunk to serve to another peer, or None if it is not here and sound."""
        try:
            data = self._cache.read(chunk_range(self.spec, chunk)) if chunk in self._cache else b""
        except StorageError:  # our trouble when we need the chunk ourselves, not the asker's
            return None
        return data if data and self._index.fits(chunk, data) else None

    def read_index(self) -> bytes:
        """Return the index to serve to another peer."""
        return self._index.data

    def statistics(self) -> TokenFileStatistics:
        """Return counters for status pages."""
        return TokenFileStatistics(
            chunks_held=len(self._cache),
            chunks_total=self.spec.num_chunks,
            chunks_fetched=self._fetched,
            chunks_damaged=self._damaged,
            bytes_fetched=self._bytes_fetched,
        )

    def close(self) -> None:
        """Close the cache; what it holds is found again at the next start."""
        self._cache.close()

    async def _ensure_chunks(self, chunks: Sequence[int]) -> None:
        if self._verified.issuperset(chunks):
            return
        async with self._lock:
            missing = [chunk for chunk in chunks if chunk not in self._verified and not await self._recheck(chunk)]
            slots = asyncio.Semaphore(PARALLEL_FETCHES)
            failure: SwarmError | None = None
            try:
                async with asyncio.TaskGroup() as group:
                    for chunk in missing:
                        group.create_task(self._fetch(chunk, slots), name=f"fetch {self.spec.name} {chunk}")
            except* SwarmError as failures:
                failure = _first(failures)
            if failure is not None:  # one plain error, because callers decide by its class
                raise failure

    async def _recheck(self, chunk: int) -> bool:
        """Hash a chunk that an earlier process kept; forget it if it is damaged."""
        if chunk not in self._cache:
            return False
        if await asyncio.to_thread(self._is_sound, chunk):
            self._verified.add(chunk)
            return True
        log.warning("tokens.damaged", file=self.spec.name, chunk=chunk)
        self._damaged += 1
        self._cache.forget(chunk)
        return False

    async def _fetch(self, chunk: int, slots: asyncio.Semaphore) -> None:
        async with slots:
            fits = partial(self._index.fits, chunk)
            fetched = await self._source.fetch_chunk(self.spec.name, chunk, fits=fits)
            if not await asyncio.to_thread(self._keep_if_sound, chunk, fetched.data):
                raise PeerFault(f"{fetched.source} sent a wrong chunk {chunk} of {self.spec.name}")
        self._verified.add(chunk)
        self._fetched += 1
        self._bytes_fetched += len(fetched.data)

    def _is_sound(self, chunk: int) -> bool:
        return self._index.fits(chunk, self._cache.read(chunk_range(self.spec, chunk)))

    def _keep_if_sound(self, chunk: int, data: bytes) -> bool:
        is_sound = self._index.fits(chunk, data)
        if is_sound:
            self._cache.store(chunk, data)
        return is_sound

    def _tokens(self, window: int) -> NDArray[np.unsignedinteger[Any]]:
        chunks = chunks_of(self.spec, (window,), sequence_length=self._sequence_length)
        assert self._verified.issuperset(chunks), f"window {window} was not ensured"
        data = self._cache.read(window_range(self.spec, window, sequence_length=self._sequence_length))
        return np.frombuffer(data, dtype=f"<u{self.spec.bytes_per_token}")


def _kept_index(spec: TokenFileSpec, path: Path) -> ChunkIndex | None:
    """Read the index that an earlier start kept; anything else is as good as none."""
    try:
        return ChunkIndex.parse(spec, path.read_bytes())
    except (OSError, WireError):
        return None


def _keep_index(path: Path, data: bytes) -> None:
    """Keep the index for the next start. Not made durable: a torn one is fetched again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise storage_error(path, error) from error


def _first(group: BaseExceptionGroup[SwarmError]) -> SwarmError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SwarmError)
    return error
