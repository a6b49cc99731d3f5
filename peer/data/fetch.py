"""Where token chunks come from: any peer that holds them, and the coordinator.

Owns: the names of token blobs and the order in which sources are asked. Must not know: whether the bytes
are right (`peer/data/tokens.py` compares hashes). A chunk of stage 0 is as good as one of the last stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from peer.data.tokens import Fetched, TokenFile
from protocol.errors import TransientError, UnreachableError
from protocol.ids import PeerId
from protocol.manifest import TokenFileSpec
from protocol.transport.blobs import Blobs

INDEX = "index"
MAX_SOURCES = 4  # besides the coordinator: more would only be more ways to wait


class SwarmChunks:
    """A `ChunkSource` over blobs."""

    def __init__(
        self, blobs: Blobs, specs: Iterable[TokenFileSpec], *, sources: Callable[[], Iterable[PeerId]]
    ) -> None:
        """`sources` lists whom to ask, best first; it is asked anew for every chunk."""
        self._blobs = blobs
        self._specs = {spec.name: spec for spec in specs}
        self._sources = sources

    async def fetch_chunk(self, file: str, chunk: int) -> Fetched:
        """Bring one chunk from the first source that has it. Raises `UnreachableError` if none has."""
        return await self._fetch(f"tokens/{file}/{chunk}", max_bytes=self._specs[file].chunk_bytes)

    async def fetch_index(self, file: str) -> Fetched:
        """Bring a file's chunk index."""
        spec = self._specs[file]
        return await self._fetch(f"tokens/{file}/{INDEX}", max_bytes=32 * spec.num_chunks)

    async def _fetch(self, name: str, *, max_bytes: int) -> Fetched:
        error: TransientError = UnreachableError(f"nobody serves {name}.")
        for peer, _ in zip(self._sources(), range(MAX_SOURCES), strict=False):
            try:
                return Fetched(await self._blobs.fetch(peer, name, max_bytes=max_bytes), peer)
            except TransientError as failed:
                error = failed
        raise error


def serve_tokens(name: str, files: Iterable[tuple[str, TokenFile]]) -> bytes | None:
    """Resolve the blob name `tokens/FILE/CHUNK` from the chunks that are here."""
    for file_name, file in files:
        prefix = f"tokens/{file_name}/"
        if not name.startswith(prefix):
            continue
        wanted = name.removeprefix(prefix)
        if wanted == INDEX:
            return file.read_index()
        return file.read_chunk(int(wanted)) if wanted.isdecimal() and len(wanted) < 10 else None
    return None
