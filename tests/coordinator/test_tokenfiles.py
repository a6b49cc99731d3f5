"""coordinator/tokenfiles.py: the files hold the corpus, and the figures are what they say."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coordinator.tokenfiles as module
from coordinator.corpus import open_corpus
from coordinator.tokenfiles import TokenFileWriter, unigram_loss, write_token_files
from coordinator.tokenizer import _bytes_tokenizer, _own
from protocol.errors import CorpusError, StorageError
from protocol.manifest import TokenFileSpec
from protocol.tokens import ChunkIndex, chunk_range

BYTES = _own(_bytes_tokenizer(), model_max_length=32)


@pytest.fixture
def two_documents(tmp_path: Path) -> Path:
    for name, line in (("a.txt", "first é\n"), ("b.txt", "zwei\n")):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / name).write_text(line * 200, encoding="utf-8")
    (tmp_path / "tokens").mkdir()
    return tmp_path


@pytest.mark.parametrize("batch_chars", [1, 700, 4_000_000])
def test_the_files_hold_every_document_behind_a_separator(
    two_documents: Path, batch_chars: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the text's own bytes with 256 before each document, however it was batched."""
    monkeypatch.setattr(module, "BATCH_CHARS", batch_chars)
    corpus = open_corpus([two_documents / "text"])
    data = write_token_files(two_documents / "tokens", corpus, BYTES)
    documents = [source.path.read_text(encoding="utf-8") for source in corpus.sources]
    expected: dict[str, list[int]] = {"train.bin": [], "heldout.bin": []}
    for text in documents:
        line = text[: text.index("\n") + 1]
        expected["train.bin"] += [256, *(line * 196).encode()]
        expected["heldout.bin"] += [256, *(line * 4).encode()]
    for spec in (data.train, data.heldout):
        tokens = np.fromfile(two_documents / "tokens" / spec.name, dtype="<u2")
        assert tokens.tolist() == expected[spec.name]
        assert spec.num_tokens == len(tokens)
    assert data.vocab_size == 257
    assert data.tokenizer_digest == BYTES.digest


def test_the_figures_are_those_of_the_tokens(two_documents: Path) -> None:
    """Oracle: add-one counts and bytes, counted again in plain Python."""
    data = write_token_files(two_documents / "tokens", open_corpus([two_documents / "text"]), BYTES)
    train, heldout = (np.fromfile(two_documents / "tokens" / f"{name}.bin", "<u2") for name in ("train", "heldout"))
    counts = Counter(train.tolist())
    nats = [-math.log((counts[token] + 1) / (len(train) + 257)) for token in heldout.tolist()]
    assert data.unigram_loss == pytest.approx(sum(nats) / len(nats), rel=1e-12)
    text_bytes = int((heldout != 256).sum())
    assert data.heldout_bytes_per_token == pytest.approx(text_bytes / len(heldout))


@given(vocab_size=st.integers(1, 40), heldout=st.lists(st.integers(0, 39), min_size=1, max_size=50))
def test_a_unigram_that_saw_nothing_knows_nothing(vocab_size: int, heldout: list[int]) -> None:
    """Oracle: add-one over no training tokens is uniform, so the loss is ln(vocabulary)."""
    counts = np.bincount([token % vocab_size for token in heldout], minlength=vocab_size)
    assert unigram_loss(np.zeros(vocab_size, dtype=np.int64), counts) == pytest.approx(math.log(vocab_size))


def _write(path: Path, ids: list[int], *, vocab_size: int, chunk_bytes: int, step: int = 7) -> TokenFileSpec:
    with TokenFileWriter(path, vocab_size=vocab_size, chunk_bytes=chunk_bytes) as writer:
        for start in range(0, len(ids), step):
            writer.append(np.array(ids[start : start + step], dtype=np.int64))
        return writer.finish()


@settings(max_examples=25)  # every file is synced to disk
@given(
    ids=st.lists(st.integers(0, 69_999), min_size=1, max_size=120),
    chunk_tokens=st.integers(1, 40),
    step=st.integers(10, 60),
    wide=st.booleans(),
)
def test_the_index_fits_the_chunks_however_tokens_arrive(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], chunk_tokens: int, step: int, wide: bool
) -> None:
    """Oracle: hashing slices of the finished file."""
    folder = tmp_path_factory.mktemp("tokens")
    size = 4 if wide else 2
    ids = ids if wide else [token % 65_536 for token in ids]
    vocab_size, chunk_bytes = (70_000 if wide else 65_536), chunk_tokens * size
    spec = _write(folder / "train.bin", ids, vocab_size=vocab_size, chunk_bytes=chunk_bytes, step=step)
    raw = (folder / "train.bin").read_bytes()
    assert raw == np.array(ids, dtype=f"<u{size}").tobytes()
    assert (spec.bytes_per_token, spec.num_tokens) == (size, len(ids))
    index = ChunkIndex.parse(spec, (folder / "train.index").read_bytes())
    for chunk in range(spec.num_chunks):
        span = chunk_range(spec, chunk)
        assert index.digest_of(chunk) == hashlib.sha256(raw[span.start : span.end]).digest()


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_the_largest_id_decides_the_width(tmp_path: Path, vocab_size: int, width: int) -> None:
    """Oracle: 65,536 ids fit two bytes, one more does not."""
    spec = _write(tmp_path / "train.bin", [vocab_size - 1], vocab_size=vocab_size, chunk_bytes=64)
    assert spec.bytes_per_token == width
    assert np.fromfile(tmp_path / "train.bin", dtype=f"<u{width}").tolist() == [vocab_size - 1]


def test_a_corpus_too_short_to_hold_anything_out_is_refused(tmp_path: Path) -> None:
    """Oracle: 2 % of 49 characters are none."""
    (tmp_path / "a.txt").write_text("x" * 49)
    with pytest.raises(CorpusError, match=r"no tokens for heldout\.bin"):
        write_token_files(tmp_path, open_corpus([tmp_path / "a.txt"]), BYTES)


def test_a_full_disk_is_told_in_one_line(two_documents: Path) -> None:
    """Oracle: the kernel's own full device."""
    (two_documents / "tokens" / "train.bin").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left on device") as caught:
        write_token_files(two_documents / "tokens", open_corpus([two_documents / "text"]), BYTES)
    assert "\n" not in caught.value.one_line()
