"""The run directory: where the organiser's side of a run lives, and the checked way to read it.

Owns: the layout, loading the signed manifest against the coordinator's own key, and serving token chunks that
fit their hashes. Must not know: the network, SQLite, torch. `coordinator/init.py` makes such a directory; the
app, the exporter and the commands open it with `RunDir.open`.

    DIR/coordinator.key          the coordinator's identity (0600)
    DIR/manifest.signed          the manifest as everybody gets it
    DIR/manifest.json            the same for people to read; never read back
    DIR/tokenizer/               a Hugging Face tokenizer folder
    DIR/tokens/train.bin, ...    token files and their indexes
    DIR/checkpoints/             see coordinator/checkpointfiles.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.checkpointfiles import Checkpoint, CheckpointFolder, StageFiles
from coordinator.tokenfiles import INDEX_SUFFIX
from coordinator.tokenizer import KNOWN_FILES, files_digest
from protocol.errors import ConfigError, CorpusError, SignatureError, StorageError, WireError
from protocol.ids import RoundId
from protocol.manifest import MANIFEST_CONTEXT, DataSpec, Manifest, TokenFileSpec
from protocol.signing import Signed, SigningKey, unseal
from protocol.tokens import ChunkIndex, chunk_range
from protocol.transport.identity import load

KEY = "coordinator.key"
SIGNED_MANIFEST = "manifest.signed"
READABLE_MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
TOKENS = "tokens"
CHECKPOINTS = "checkpoints"
_RESTORE = "Restore it from a backup, or make a new run with: coordinator init"


@dataclass(frozen=True, slots=True)
class RunDir:
    """An opened run directory. Its manifest was signed by the key beside it."""

    path: Path
    key: SigningKey
    signed: Signed
    manifest: Manifest
    checkpoints_turn: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False, compare=False)
    """Is held by whoever adds checkpoints, or takes some away, for as long as it relies on what is there."""
    _indexes: dict[str, ChunkIndex] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Open a run, or raise `ConfigError` saying why this is not one."""
        if not (path / SIGNED_MANIFEST).is_file():
            raise ConfigError(f"{path} holds no run.", hint=f"Make one with: coordinator init {path} --corpus PATH")
        key = _load_key(path / KEY)
        signed, manifest = _load_manifest(path / SIGNED_MANIFEST, key)
        return cls(path, key, signed, manifest)

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The run's checkpoints."""
        return CheckpointFolder(
            self.path / CHECKPOINTS,
            run=self.manifest.run_id,
            num_stages=self.manifest.model.num_stages,
            keep=self.manifest.keeping.checkpoints_kept,
        )

    def write_checkpoint(self, round_id: RoundId, stages: Sequence[StageFiles]) -> Checkpoint:
        """Add the checkpoint of the state that `round_id` starts from; `StorageError` leaves the old ones untouched."""
        return self.checkpoints.write(round_id, stages)

    def newest_checkpoint(self) -> Checkpoint | None:
        """Return the newest checkpoint whose files are sound, or None."""
        return self.checkpoints.newest()

    def token_file(self, name: str) -> TokenFileSpec | None:
        """Return the manifest's entry of a token file, or None if the run has no file of that name."""
        return next((spec for spec in token_files(self.manifest.data) if spec.name == name), None)

    def index(self, spec: TokenFileSpec) -> ChunkIndex:
        """Return the index of a token file, or raise `CorpusError` if it is not the manifest's."""
        if spec.name not in self._indexes:
            path = (self.path / TOKENS / spec.name).with_suffix(INDEX_SUFFIX)
            try:
                self._indexes[spec.name] = ChunkIndex.parse(spec, path.read_bytes())
            except OSError as error:
                raise CorpusError(f"cannot read {path}: {error.strerror}.", hint=_RESTORE) from error
            except WireError as error:
                raise CorpusError(f"{path} is damaged: {error}.", hint=_RESTORE) from error
        return self._indexes[spec.name]

    def read_chunk(self, spec: TokenFileSpec, chunk: int) -> bytes:
        """Return a chunk, or raise `CorpusError` naming file and chunk if it does not fit its hash.

        Checked on every read: a damaged chunk must stop here, or volunteers would take us for a liar.
        """
        path = self.path / TOKENS / spec.name
        span = chunk_range(spec, chunk)
        try:
            with path.open("rb") as file:
                file.seek(span.start)
                data = file.read(span.length)
        except OSError as error:
            raise CorpusError(f"cannot read {path}: {error.strerror}.", hint=_RESTORE) from error
        if not self.index(spec).fits(chunk, data):
            raise CorpusError(f"{path} is damaged: chunk {chunk} does not fit its hash.", hint=_RESTORE)
        return data

    def verify_tokens(self) -> None:
        """Hash both token files, or raise `CorpusError` naming the first damaged chunk. Reads every byte."""
        for spec in token_files(self.manifest.data):
            path = self.path / TOKENS / spec.name
            for chunk in range(spec.num_chunks):
                self.read_chunk(spec, chunk)
            if path.stat().st_size != spec.num_bytes:
                raise CorpusError(f"{path} is longer than the {spec.num_bytes} bytes it should have.", hint=_RESTORE)

    def tokens_stamp(self) -> str:
        """Return what changes when somebody writes to a token file: sizes and modification times."""
        try:
            stats = [(self.path / TOKENS / spec.name).stat() for spec in token_files(self.manifest.data)]
        except OSError as error:
            raise CorpusError(f"cannot read {error.filename}: {error.strerror}.", hint=_RESTORE) from error
        return " ".join(f"{stat.st_size}/{stat.st_mtime_ns}" for stat in stats)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the tokenizer's files by name, or raise `ConfigError` if they are not the run's."""
        folder = self.path / TOKENIZER
        try:
            files = {name: (folder / name).read_bytes() for name in KNOWN_FILES if (folder / name).is_file()}
        except OSError as error:
            raise StorageError(f"cannot read {folder}: {error.strerror}.") from error
        if files_digest(files) != self.manifest.data.tokenizer_digest:
            raise ConfigError(f"the tokenizer in {folder} is not the one of this run.", hint=_RESTORE)
        return files


def token_files(data: DataSpec) -> tuple[TokenFileSpec, TokenFileSpec]:
    """Return the entries of both token files."""
    return data.train, data.heldout


def _load_key(path: Path) -> SigningKey:
    try:
        return load(path)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is missing, and nobody believes a coordinator without it.", hint="Restore it from a backup."
        ) from None


def _load_manifest(path: Path, key: SigningKey) -> tuple[Signed, Manifest]:
    try:
        signed = Signed.from_bytes(path.read_bytes())
        return signed, unseal(signed, MANIFEST_CONTEXT, Manifest, signer=key.peer_id)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
    except SignatureError as error:
        raise ConfigError(
            f"{path} does not belong to {KEY} beside it: {error}.", hint="Restore both from the same backup."
        ) from error
    except WireError as error:
        raise ConfigError(f"{path} is damaged: {error}.", hint=_RESTORE) from error
