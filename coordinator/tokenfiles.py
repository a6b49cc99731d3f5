"""Turn text into the two token files of a run, and measure what is needed to read its losses.

Owns: encoding in batches, the files `train.bin` and `heldout.bin` with their indexes, and the figures that
come for free while every token passes by: the unigram loss and the bytes per held-out token. Must not know:
models, rounds. Called by `coordinator/init.py`; the format is `protocol/tokens.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, Self

import numpy as np
from numpy.typing import NDArray

from coordinator.corpus import Corpus, Passage
from coordinator.durable import storage_faults, write_file
from coordinator.tokenizer import TextTokenizer
from protocol.errors import CorpusError
from protocol.ids import Digest, digest
from protocol.manifest import DataSpec, TokenFileSpec
from protocol.tokens import CHUNK_BYTES, index_bytes

TRAIN = "train.bin"
HELDOUT = "heldout.bin"
INDEX_SUFFIX = ".index"
BATCH_CHARS = 4_000_000  # text encoded at once: enough to keep every core busy, some 50 MB of ids and strings


class TokenFileWriter:
    """Appends ids to a token file, hashing chunk by chunk as it goes. A context manager; `finish` completes it."""

    def __init__(self, path: Path, *, vocab_size: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._path = path
        self._bytes_per_token: Literal[2, 4] = 2 if vocab_size <= 1 << 16 else 4
        self._chunk_bytes = chunk_bytes
        self._chunk = bytearray()
        self._digests: list[Digest] = []
        self.counts: NDArray[np.int64] = np.zeros(vocab_size, dtype=np.int64)
        with storage_faults(path):
            self._file: BinaryIO = path.open("wb")

    def append(self, ids: NDArray[np.int64]) -> None:
        """Write ids, counting each."""
        self.counts += np.bincount(ids, minlength=len(self.counts))
        self._chunk += ids.astype(f"<u{self._bytes_per_token}").tobytes()
        while len(self._chunk) >= self._chunk_bytes:
            self._write(bytes(self._chunk[: self._chunk_bytes]))
            del self._chunk[: self._chunk_bytes]

    def finish(self) -> TokenFileSpec:
        """Write what is left and the index, and return the file's entry in the manifest."""
        if self._chunk:
            self._write(bytes(self._chunk))
        self._close()
        if not self._digests:
            raise CorpusError(f"the corpus leaves no tokens for {self._path.name}.", hint="Add text with --corpus.")
        index = index_bytes(self._digests)
        write_file(self._path.with_suffix(INDEX_SUFFIX), index)
        return TokenFileSpec(
            name=self._path.name,
            num_tokens=int(self.counts.sum()),
            bytes_per_token=self._bytes_per_token,
            chunk_bytes=self._chunk_bytes,
            index_digest=digest(index),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self._close()

    def _close(self) -> None:
        with storage_faults(self._path):
            self._file.close()  # what it still had buffered may not fit any more

    def _write(self, chunk: bytes) -> None:
        with storage_faults(self._path):
            self._file.write(chunk)
        self._digests.append(Digest(hashlib.sha256(chunk).digest()))


def write_token_files(directory: Path, corpus: Corpus, tokenizer: TextTokenizer) -> DataSpec:
    """Write the token files of `corpus` into an existing folder and describe them for the manifest.

    Streams: memory does not grow with the corpus. The folder's owner makes it durable (`coordinator/durable.py`).
    """
    vocab_size = tokenizer.vocab_size
    heldout_bytes = 0
    with (
        TokenFileWriter(directory / TRAIN, vocab_size=vocab_size) as train,
        TokenFileWriter(directory / HELDOUT, vocab_size=vocab_size) as heldout,
    ):
        for batch in _batches(corpus.passages()):
            for passage, ids in zip(batch, tokenizer.encode([passage.text for passage in batch]), strict=True):
                writer = heldout if passage.is_heldout else train
                heldout_bytes += len(passage.text.encode()) if passage.is_heldout else 0
                writer.append(np.array([tokenizer.separator_id, *ids] if passage.starts else ids, dtype=np.int64))
        train_spec, heldout_spec = train.finish(), heldout.finish()
    return DataSpec(
        vocab_size=vocab_size,
        tokenizer_digest=tokenizer.digest,
        train=train_spec,
        heldout=heldout_spec,
        heldout_bytes_per_token=heldout_bytes / heldout_spec.num_tokens,
        unigram_loss=unigram_loss(train.counts, heldout.counts),
    )


def unigram_loss(training: NDArray[np.int64], heldout: NDArray[np.int64]) -> float:
    """Return the nats per held-out token under the add-one unigram of the training tokens."""
    log_probability = np.log(training + 1.0) - np.log(training.sum() + len(training))
    return float(-(heldout * log_probability).sum() / heldout.sum())


def _batches(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Group passages into lists of about `BATCH_CHARS` characters."""
    batch: list[Passage] = []
    size = 0
    for passage in passages:
        batch.append(passage)
        size += len(passage.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
