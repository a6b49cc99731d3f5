"""The tokenizer of a run: bytes, trained on the corpus, or brought along; kept as a Hugging Face folder.

Owns: the `--tokenizer` choice, training, the files that `AutoTokenizer.from_pretrained` loads without code
of ours, and their digest. Must not know: token files, models. Called by `coordinator/init.py`.

One special token, the separator, opens every document. It is also the beginning and the end of text for
whoever generates with the exported model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from coordinator.corpus import Corpus
from coordinator.durable import storage_faults, write_file
from protocol.errors import ConfigError
from protocol.ids import Digest, digest

SEPARATOR = "<|endoftext|>"
NUM_BYTE_VALUES = 256
MAX_TRAINED_VOCAB = 262_144
SAMPLE_CHARS = 8_000_000  # merges settle long before that; training 1,024 of them on 8 MB takes about 3 s of one core
DEFINITION = "tokenizer.json"
SETTINGS = "tokenizer_config.json"

# What a Hugging Face folder may hold besides weights. Only these are copied: a folder can hold anything.
KNOWN_FILES = (
    DEFINITION,
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "tokenizer.model",
    "vocab.json",
)
# How the tokenizers of the supported families name the end of a text, tried when the settings do not say.
USUAL_SEPARATORS = (SEPARATOR, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A tokenizer ready to encode, with the files it is kept in."""

    backend: Tokenizer
    files: dict[str, bytes]
    separator_id: int

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: what the embedding must hold, even where ids are missing in between."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def digest(self) -> Digest:
        return files_digest(self.files)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, nothing added, on all cores.

        Text that spells out a special token is encoded as the characters it is: a corpus cannot forge separators.
        """
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def save(self, directory: Path) -> None:
        """Write the folder that `AutoTokenizer.from_pretrained` reads."""
        with storage_faults(directory):
            directory.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            write_file(directory / name, data)


def make_tokenizer(choice: str, corpus: Corpus, *, model_max_length: int) -> TextTokenizer:
    """Build the tokenizer that `bytes`, `train:N` or a path asks for, or raise `ConfigError`.

    `model_max_length` tells users of the exported model how much text it was trained to see at once.
    """
    if choice == "bytes":
        return _own(_bytes_tokenizer(), model_max_length=model_max_length)
    if choice.startswith("train:"):
        return _own(_train(_wanted_size(choice), corpus), model_max_length=model_max_length)
    return load_tokenizer(Path(choice), model_max_length=model_max_length)


def foreseen_size(choice: str) -> int | None:
    """Return how many tokens a choice of `make_tokenizer` will have; None if that takes reading a file."""
    if choice == "bytes":
        return NUM_BYTE_VALUES + 1
    return _wanted_size(choice) if choice.startswith("train:") else None


def load_tokenizer(path: Path, *, model_max_length: int | None = None) -> TextTokenizer:
    """Read a `tokenizer.json` or a Hugging Face folder that holds one, or raise `ConfigError`."""
    folder = path if path.is_dir() else path.parent
    definition = path / DEFINITION if path.is_dir() else path
    if not definition.is_file():
        hint = "--tokenizer wants 'bytes', 'train:N', a tokenizer.json, or a folder that holds one."
        raise ConfigError(f"there is no tokenizer at {path}.", hint=hint)
    names = [name for name in KNOWN_FILES if path.is_dir() and (folder / name).is_file()]
    try:
        files = {DEFINITION: definition.read_bytes()} | {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise ConfigError(f"cannot read the tokenizer at {path}: {error.strerror}.") from error
    backend = _parse(files[DEFINITION], definition)
    settings = _settings(files.get(SETTINGS), definition)
    separator = _separator(settings, backend, definition)
    if SETTINGS not in files:
        files[SETTINGS] = _settings_bytes(separator, model_max_length=model_max_length)
    return _ready(backend, files, separator)


def files_digest(files: dict[str, bytes]) -> Digest:
    """Hash the names and contents of a tokenizer's files: the same folder has the same digest everywhere."""
    parts = []
    for name, data in sorted(files.items()):
        parts += [name.encode(), b"\0", len(data).to_bytes(8, "big"), data]
    return digest(*parts)


def _own(backend: Tokenizer, *, model_max_length: int) -> TextTokenizer:
    files = {
        DEFINITION: (backend.to_str(pretty=True) + "\n").encode(),
        SETTINGS: _settings_bytes(SEPARATOR, model_max_length=model_max_length),
    }
    return _ready(backend, files, SEPARATOR)


def _ready(backend: Tokenizer, files: dict[str, bytes], separator: str) -> TextTokenizer:
    backend.encode_special_tokens = True
    separator_id = backend.token_to_id(separator)
    assert separator_id is not None
    return TextTokenizer(backend, dict(sorted(files.items())), separator_id)


def _bytes_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes themselves, 256 is the separator: BPE that knows no merge."""
    vocabulary = {char: value for value, char in enumerate(_byte_alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([SEPARATOR])
    return backend


def _byte_alphabet() -> Iterator[str]:
    """Yield the printable stand-in of every byte value, in byte order, as GPT-2's byte-level scheme assigns them."""
    spare = NUM_BYTE_VALUES
    for value in range(NUM_BYTE_VALUES):
        if 0x21 <= value <= 0x7E or 0xA1 <= value <= 0xAC or 0xAE <= value <= 0xFF:
            yield chr(value)
        else:
            yield chr(spare)
            spare += 1


def _train(vocab_size: int, corpus: Corpus) -> Tokenizer:
    """Train a byte-level BPE on a sample of the training text; the same corpus gives the same tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=list(_byte_alphabet()),  # every byte can be encoded, seen in training or not
        show_progress=False,
    )
    backend.train_from_iterator(corpus.training_sample(SAMPLE_CHARS), trainer)
    return backend


def _wanted_size(choice: str) -> int:
    number = choice.removeprefix("train:").replace(",", "")
    smallest = NUM_BYTE_VALUES + 1
    if not number.isdecimal() or not smallest <= int(number) <= MAX_TRAINED_VOCAB:
        hint = f"N in train:N is a number from {smallest} to {MAX_TRAINED_VOCAB}."
        raise ConfigError(f"'{choice}' is not a tokenizer.", hint=hint)
    return int(number)


def _parse(data: bytes, path: Path) -> Tokenizer:
    try:
        backend: Tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing more precise
        raise ConfigError(f"{path} is not a Hugging Face tokenizer: {error}.") from None
    backend.no_truncation()  # a saved length limit would silently drop most of every document
    backend.no_padding()
    return backend


def _settings(data: bytes | None, path: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, refusing one that loads code from its folder."""
    if data is None:
        return {}
    try:
        settings = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{path.with_name(SETTINGS)} is not JSON: {error}.") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path.with_name(SETTINGS)} does not hold settings.")
    if "auto_map" in settings:
        raise ConfigError(f"the tokenizer at {path} needs code of its own, which nobody here would run.")
    return settings


def _separator(settings: dict[str, Any], backend: Tokenizer, path: Path) -> str:
    """Find the token that separates documents: what the settings call end of text, else a usual name."""
    named = settings.get("eos_token") or settings.get("bos_token")
    if isinstance(named, dict):  # a serialised AddedToken
        named = named.get("content")
    for candidate in (named, *USUAL_SEPARATORS):
        if isinstance(candidate, str) and backend.token_to_id(candidate) is not None:
            return candidate
    raise ConfigError(
        f"the tokenizer at {path} has no end-of-text token, which is needed between documents.",
        hint=f"Name one as eos_token in its {SETTINGS}.",
    )


def _settings_bytes(separator: str, *, model_max_length: int | None) -> bytes:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator,
        "eos_token": separator,
        "clean_up_tokenization_spaces": False,  # decoding gives back exactly what was encoded
    }
    if model_max_length is not None:
        settings["model_max_length"] = model_max_length
    return (json.dumps(settings, indent=2) + "\n").encode()
