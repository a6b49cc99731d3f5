"""coordinator/tokenizer.py: reversible, reproducible, and loadable by transformers without code of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from coordinator.corpus import Corpus, open_corpus
from coordinator.tokenizer import (
    SEPARATOR,
    TextTokenizer,
    _bytes_tokenizer,
    _own,
    files_digest,
    load_tokenizer,
    make_tokenizer,
)
from protocol.errors import ConfigError
from tests.coordinator.runs import write_prose

BYTES = _own(_bytes_tokenizer(), model_max_length=32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus([write_prose(tmp_path_factory.mktemp("text") / "prose.txt", chars=40_000)])


@pytest.fixture(scope="module")
def trained(corpus: Corpus) -> TextTokenizer:
    return make_tokenizer("train:400", corpus, model_max_length=32)


@given(st.text(max_size=60))
def test_byte_ids_are_the_bytes(text: str) -> None:
    """Oracle: UTF-8."""
    assert BYTES.encode([text]) == [list(text.encode())]
    assert (BYTES.vocab_size, BYTES.separator_id) == (257, 256)


@given(text=st.text(max_size=80))
def test_a_trained_tokenizer_gives_any_text_back(trained: TextTokenizer, text: str) -> None:
    """Oracle: decoding inverts encoding, also for characters that training never saw."""
    ids = trained.encode([text])[0]
    assert trained.backend.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= token < trained.vocab_size for token in ids)


def test_training_compresses_the_text_it_saw(trained: TextTokenizer, corpus: Corpus) -> None:
    """Oracle: 400 entries make fewer tokens than bytes; it would be equal had training learnt nothing."""
    text = "".join(corpus.training_sample(10**9))
    assert trained.vocab_size == 400
    assert len(trained.encode([text])[0]) < 0.7 * len(text.encode())


@pytest.mark.parametrize("which", ["bytes", "trained"])
def test_text_cannot_forge_a_separator(trained: TextTokenizer, which: str) -> None:
    """Oracle: a corpus that spells out the special token gets its characters."""
    made = BYTES if which == "bytes" else trained
    ids = made.encode([f"a{SEPARATOR}b"])[0]
    assert made.separator_id not in ids
    assert made.backend.decode(ids, skip_special_tokens=False) == f"a{SEPARATOR}b"


@pytest.mark.slow
def test_the_same_corpus_gives_the_same_tokenizer_in_another_process(trained: TextTokenizer, corpus: Corpus) -> None:
    """Oracle: the digest, computed by a Python with another hash seed."""
    program = (
        "import sys; from pathlib import Path; from coordinator.corpus import open_corpus;"
        "from coordinator.tokenizer import make_tokenizer;"
        "made = make_tokenizer('train:400', open_corpus([Path(sys.argv[1])]), model_max_length=32);"
        "print(made.digest.hex())"
    )
    command = [sys.executable, "-c", program, str(corpus.sources[0].path)]
    root = Path(__file__).parents[2]
    output = subprocess.run(
        command, env={"PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == trained.digest.hex()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["bytes", "trained"])
def test_transformers_loads_it_and_agrees(trained: TextTokenizer, corpus: Corpus, tmp_path: Path, which: str) -> None:
    """Oracle: `AutoTokenizer` gives the same ids and the text back, and knows the end of text."""
    from transformers import AutoTokenizer

    made = BYTES if which == "bytes" else trained
    made.save(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", trust_remote_code=False)
    text = "  " + next(corpus.training_sample(10**9))[:2000] + "\n\t naïve , 🙂 don't ."
    ids = loaded(text)["input_ids"]
    assert ids == made.encode([text])[0]
    assert loaded.decode(ids) == text
    assert loaded.eos_token_id == loaded.bos_token_id == made.separator_id
    assert len(loaded) == made.vocab_size
    assert loaded.model_max_length == 32


def test_saving_and_loading_keeps_the_digest(trained: TextTokenizer, tmp_path: Path) -> None:
    """Oracle: what a peer or an export reads back is the manifest's tokenizer, to the byte."""
    trained.save(tmp_path / "a" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "a" / "tokenizer")
    assert loaded.digest == trained.digest
    assert loaded.encode(["some text"]) == trained.encode(["some text"])
    assert loaded.separator_id == trained.separator_id


def test_the_digest_sees_names_and_contents() -> None:
    """Oracle: no two of these are the same folder, though their bytes joined are."""
    folders: list[dict[str, bytes]] = [{"a": b"bc"}, {"ab": b"c"}, {"a": b"b", "c": b""}, {"a": b"", "b": b"c"}]
    assert len({files_digest(folder) for folder in folders}) == len(folders)
    assert files_digest({"b": b"2", "a": b"1"}) == files_digest({"a": b"1", "b": b"2"})


def _foreign(folder: Path, *, settings: dict[str, Any] | None, special: str = "</s>") -> Path:
    """Save a word-level tokenizer the way somebody else would have."""
    backend = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([special])
    backend.enable_truncation(2)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "model.safetensors").write_bytes(b"weights")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "special"),
    [
        ({"eos_token": "<done>"}, "<done>"),
        ({"eos_token": {"content": "<done>", "__type": "AddedToken"}}, "<done>"),
        ({"bos_token": "<go>"}, "<go>"),
        ({"eos_token": None}, "</s>"),
        (None, "<|im_end|>"),
    ],
)
def test_a_tokenizer_brought_along_keeps_its_files_and_end_of_text(
    corpus: Corpus, tmp_path: Path, settings: dict[str, Any] | None, special: str
) -> None:
    """Oracle: by hand; id 3 is the special token, whatever it is called; weights are not copied."""
    folder = _foreign(tmp_path / "theirs", settings=settings, special=special)
    made = make_tokenizer(str(folder), corpus, model_max_length=32)
    assert made.separator_id == 3
    assert made.vocab_size == 4
    assert made.files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    assert set(made.files) == {"tokenizer.json", "tokenizer_config.json"}


def test_a_saved_length_limit_does_not_cut_the_corpus(corpus: Corpus, tmp_path: Path) -> None:
    """Oracle: four words are four tokens, though the file says to stop after two."""
    made = make_tokenizer(str(_foreign(tmp_path, settings=None) / "tokenizer.json"), corpus, model_max_length=32)
    assert made.encode(["hello world hello world"]) == [[0, 1, 0, 1]]


@pytest.mark.parametrize(
    "choice",
    ["train:", "train:256", "train:x", "train:1e3", "train:99999999", "train:-400", "nowhere", "broken", "folder"],
)
def test_an_impossible_choice_is_one_clear_line(corpus: Corpus, tmp_path: Path, choice: str) -> None:
    """Oracle: exit code 3, the choice in the message, one line."""
    (tmp_path / "broken").write_text('{"version": "1.0"}')
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as caught:
        make_tokenizer(choice if choice.startswith("train:") else str(tmp_path / choice), corpus, model_max_length=32)
    assert caught.value.exit_code == 3
    assert choice in str(caught.value)
    assert "\n" not in caught.value.one_line()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"auto_map": {"AutoTokenizer": ["x.X", None]}}, "code of its own"), ([], "does not hold settings")],
)
def test_settings_that_cannot_be_followed_are_refused(
    corpus: Corpus, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    """Oracle: the reason is in the message."""
    with pytest.raises(ConfigError, match=reason):
        make_tokenizer(str(_foreign(tmp_path, settings=settings)), corpus, model_max_length=32)


def test_a_tokenizer_without_an_end_of_text_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    """Oracle: documents could not be told apart; the hint says what to name."""
    with pytest.raises(ConfigError, match="no end-of-text token") as caught:
        make_tokenizer(str(_foreign(tmp_path, settings=None, special="<pad>")), corpus, model_max_length=32)
    assert "eos_token" in caught.value.hint
