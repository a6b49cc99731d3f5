"""What the coordinator hands out by name: token chunks and checkpoints.

Owns: from a blob name to bytes or a file, and nothing a name was not meant for. Must not know: who asks (the
run's text and its checkpoints are for everybody who can connect), how bytes travel.

    tokens/NAME/index, tokens/NAME/CHUNK
    checkpoint/ROUND/FILE, checkpoint/newest/FILE
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from coordinator.checkpointfiles import RECORD, Checkpoint
from coordinator.rundir import RunDir
from protocol.errors import CorpusError
from protocol.ids import PeerId, RoundId
from protocol.transport.blobs import Load

CACHED_CHUNKS = 8  # newcomers read the same rounds at the same time
MAX_DIGITS = 12


class Shelf:
    """Resolves blob names within one run directory."""

    def __init__(
        self, run: RunDir, *, newest: Callable[[], Checkpoint | None], on_damage: Callable[[str], None]
    ) -> None:
        """`newest` is the checkpoint to hand out; `on_damage` hears, in any thread, of damaged token files."""
        self._run = run
        self._newest = newest
        self._on_damage = on_damage
        self._chunk = lru_cache(maxsize=CACHED_CHUNKS)(self._read_chunk)

    def resolve(self, caller: PeerId, name: str) -> Path | bytes | Load | None:
        """Return what a blob name stands for, or None."""
        match name.split("/"):
            case ["tokens", file, piece]:
                return self._tokens(file, piece)
            case ["checkpoint", round_id, file]:
                return self._checkpoint(round_id, file)
        return None

    def _tokens(self, file: str, piece: str) -> Load | None:
        spec = self._run.token_file(file)
        if spec is None:
            return None
        if piece == "index":
            return partial(self._load, lambda: self._run.index(spec).data)
        if _is_number(piece) and int(piece) < spec.num_chunks:
            return partial(self._load, lambda: self._chunk(file, int(piece)))
        return None

    def _load(self, read: Callable[[], bytes]) -> bytes | None:
        try:
            return read()
        except CorpusError as error:  # ours is damaged; others have the chunk too
            self._on_damage(error.one_line())
            return None

    def _read_chunk(self, file: str, chunk: int) -> bytes:
        spec = self._run.token_file(file)
        assert spec is not None
        return self._run.read_chunk(spec, chunk)

    def _checkpoint(self, round_id: str, file: str) -> Path | None:
        newest = self._newest()
        if newest is None:
            return None
        if round_id == "newest":
            return _file_of(newest, file)
        if not _is_number(round_id) or RoundId(int(round_id)) > newest.round:
            return None
        if int(round_id) == newest.round:
            return _file_of(newest, file)
        # an older one that somebody began to fetch: its record is not read again, its name is checked by shape
        older = newest.path.parent / f"round-{int(round_id):06d}" / file
        return older if file in _file_names(newest) and older.is_file() else None


def _file_of(checkpoint: Checkpoint, file: str) -> Path | None:
    return checkpoint.path / file if file in _file_names(checkpoint) else None


def _file_names(checkpoint: Checkpoint) -> frozenset[str]:
    return frozenset({RECORD} | {file.name for stage in checkpoint.record.stages for file in stage.files})


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS
