"""Where token chunks come from: any peer that holds them, and the coordinator.

Owns: the names of token blobs, the order in which sources are asked, and going on to the next one when bytes do
not fit. Must not know: what they have to fit (`peer/data/tokens.py` does). A chunk of stage 0 is as good as one of
the last stage.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import structlog

from peer.data.tokens import Fetched, TokenFile
from protocol.batches import TaskKind
from protocol.errors import PeerFault, SwarmError, TransientError, UnreachableError
from protocol.ids import PeerId
from protocol.manifest import Manifest, TokenFileSpec
from protocol.transport.blobs import Blobs, Load

log = structlog.get_logger()

INDEX = "index"


class SwarmChunks:
    """A `ChunkSource` over blobs."""

    def __init__(
        self, blobs: Blobs, specs: Iterable[TokenFileSpec], *, sources: Callable[[str], Iterable[PeerId]]
    ) -> None:
        """`sources` lists whom to ask for a blob, best first; it is asked anew for every one."""
        self._blobs = blobs
        self._specs = {spec.name: spec for spec in specs}
        self._sources = sources

    async def fetch_chunk(self, file: str, chunk: int, *, fits: Callable[[bytes], bool]) -> Fetched:
        """Bring one chunk from the first source that has it, and has the right one.

        Raises `UnreachableError` if none has it, `PeerFault` naming the last one that sent something else.
        """
        return await self._fetch(f"tokens/{file}/{chunk}", max_bytes=self._specs[file].chunk_bytes, fits=fits)

    async def fetch_index(self, file: str, *, fits: Callable[[bytes], bool]) -> Fetched:
        """Bring a file's chunk index. Raises like `fetch_chunk`."""
        return await self._fetch(f"tokens/{file}/{INDEX}", max_bytes=32 * self._specs[file].num_chunks, fits=fits)

    async def _fetch(self, name: str, *, max_bytes: int, fits: Callable[[bytes], bool]) -> Fetched:
        problem: SwarmError = UnreachableError(f"nobody serves {name}.")
        for peer in self._sources(name):
            try:
                data = await self._blobs.fetch(peer, name, max_bytes=max_bytes)
            except (TransientError, PeerFault) as failed:
                problem = failed
                continue
            if await asyncio.to_thread(fits, data):
                return Fetched(data, peer)
            log.warning("tokens.wrong", source=peer, name=name)
            problem = PeerFault(f"{peer} sent a wrong {name}")
        raise problem


async def open_files(
    files: dict[TaskKind, TokenFile],
    manifest: Manifest,
    *,
    folder: Path,
    blobs: Blobs,
    sources: Callable[[str], Iterable[PeerId]],
) -> None:
    """Open the run's token files in a folder, fetching what is not there, but for those that are open already.

    `sources` is as for `SwarmChunks`. Raises what `TokenFile.open` does; what was opened until then stays.
    """
    specs = {TaskKind.TRAIN: manifest.data.train, TaskKind.EVAL: manifest.data.heldout}
    chunks = SwarmChunks(blobs, specs.values(), sources=sources)
    for kind, spec in specs.items():
        if kind not in files:
            length = manifest.batch.sequence_length
            files[kind] = await TokenFile.open(spec, folder, sequence_length=length, source=chunks)


def serve_tokens(name: str, files: Iterable[tuple[str, TokenFile]]) -> bytes | Load | None:
    """Resolve the blob name `tokens/FILE/CHUNK` from the chunks that are here; each is hashed before it goes out."""
    for file_name, file in files:
        prefix = f"tokens/{file_name}/"
        if not name.startswith(prefix):
            continue
        wanted = name.removeprefix(prefix)
        if wanted == INDEX:
            return file.read_index()
        return partial(file.read_chunk, int(wanted)) if wanted.isdecimal() and len(wanted) < 10 else None
    return None
