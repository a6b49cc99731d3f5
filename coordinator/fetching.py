"""One file from several peers: ranges in parallel, any source may fail, the hash decides.

Owns: spreading ranges over sources, giving up on those that fail, and finding the liar when the hash is
wrong. Must not know: what the file is. Used by `checkpoints.py`; the transport is a function, so that tests
need no network.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import structlog

from coordinator.durable import storage_faults
from protocol.errors import PeerFault, TransientError, UnreachableError
from protocol.ids import Digest, PeerId

log = structlog.get_logger()

RANGE_BYTES = 4 * 1024 * 1024
PARALLEL_RANGES = 4  # of one file: enough to use several homes' uplinks at once, 16 MiB of memory

FetchRange = Callable[[PeerId, str, int, int], Awaitable[tuple[bytes, int]]]
"""(peer, blob name, offset, length) -> (bytes, total size), as `Blobs.fetch_range` without its keywords."""


class WrongHashError(PeerFault):
    """Nobody brings the file, and these bring another one than they offered."""

    def __init__(self, message: str, *, liars: tuple[PeerId, ...]) -> None:
        super().__init__(message)
        self.liars = liars


async def fetch_file(
    name: str, target: Path, *, num_bytes: int, sha256: Digest, sources: Sequence[PeerId], fetch_range: FetchRange
) -> tuple[PeerId, ...]:
    """Write the blob `name` to `target`, verified; return which sources were found out to serve another file.

    First all sources share the work; if the result is wrong, they are asked one after the other. Raises
    `UnreachableError` if nobody can bring it, `WrongHashError` if only liars can, `StorageError` if it cannot
    be written.
    """
    await _fetch_once(name, target, num_bytes=num_bytes, sources=sources, fetch_range=fetch_range)
    if await asyncio.to_thread(_hash, target) == sha256:
        return ()
    liars: list[PeerId] = []
    for source in sources:
        try:
            await _fetch_once(name, target, num_bytes=num_bytes, sources=[source], fetch_range=fetch_range)
        except UnreachableError:
            continue
        if await asyncio.to_thread(_hash, target) == sha256:
            return tuple(liars)
        liars.append(source)
    raise WrongHashError(f"{name} is not what was offered", liars=tuple(liars))


async def _fetch_once(
    name: str, target: Path, *, num_bytes: int, sources: Sequence[PeerId], fetch_range: FetchRange
) -> None:
    ranges = [(start, min(RANGE_BYTES, num_bytes - start)) for start in range(0, num_bytes, RANGE_BYTES)]
    ranges.reverse()  # popped from the end: in file order
    failed: set[PeerId] = set()
    with storage_faults(target):
        file = await asyncio.to_thread(_open_empty, target)
    try:
        workers = min(PARALLEL_RANGES, len(ranges))
        async with asyncio.TaskGroup() as tasks:
            for number in range(workers):
                tasks.create_task(_work(name, target, file, ranges, failed, sources, number, fetch_range))
    except ExceptionGroup as group:  # several may fail at the same time, for the same reason
        raise group.exceptions[0] from None
    finally:
        os.close(file)


async def _work(
    name: str,
    target: Path,
    file: int,
    ranges: list[tuple[int, int]],
    failed: set[PeerId],
    sources: Sequence[PeerId],
    number: int,
    fetch_range: FetchRange,
) -> None:
    """Fetch ranges until there are none left, starting with a source of our own."""
    while ranges:
        start, length = ranges.pop()
        while length:
            usable = [source for source in sources if source not in failed]
            if not usable:
                raise UnreachableError(f"all {len(sources)} sources of {name} failed")
            source = usable[number % len(usable)]
            try:
                piece, _ = await fetch_range(source, name, start, length)
                if not 0 < len(piece) <= length:
                    raise PeerFault(f"{source} brought {len(piece)} bytes of {name} instead of up to {length}")
            except (TransientError, PeerFault) as error:
                log.info("source.failed", peer=source, name=name, error=error.one_line())
                failed.add(source)
                continue
            with storage_faults(target):
                await asyncio.to_thread(os.pwrite, file, piece, start)
            start, length = start + len(piece), length - len(piece)


def _open_empty(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)


def _hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
