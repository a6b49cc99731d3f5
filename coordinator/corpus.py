"""The text that a run trains on: files and folders in, passages of text out.

Owns: which files count, how bytes become text, and where each file is cut into training and held-out
text. Must not know: tokens. Used by `coordinator/tokenizer.py` (a sample) and `coordinator/tokenfiles.py`
(all of it), through `coordinator/init.py`.

Text is streamed in pieces of about a megabyte; what stays in memory is one small record per file. A file
is read twice, once to count its characters (the held-out text is its last 2 %) and once to be used.
"""

from __future__ import annotations

import codecs
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from protocol.errors import CorpusError

HELDOUT_SHARE = 50  # one character in 50, the last 2 % of each file
LINE_REACH = 400  # characters to look ahead for a line end to cut at: a few lines of prose or code
PIECE_BYTES = 1024 * 1024

# Folders of the standard library that would teach a model little: its own tests, packages that are not part
# of it, and generated tables (code pages, help texts, grammars).
STDLIB_SKIPPED = frozenset(
    {"dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}
)


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of one document. A document's pieces follow each other; `starts` marks its first in either part."""

    text: str
    is_heldout: bool
    starts: bool


@dataclass(frozen=True, slots=True)
class Source:
    """One text file, and how many characters it decodes to."""

    path: Path
    num_chars: int

    @property
    def heldout_chars(self) -> int:
        return self.num_chars // HELDOUT_SHARE


@dataclass(frozen=True, slots=True)
class Corpus:
    """All the text of a run, in the order in which it becomes tokens."""

    sources: tuple[Source, ...]

    @property
    def training_chars(self) -> int:
        return sum(source.num_chars - source.heldout_chars for source in self.sources)

    def passages(self) -> Iterator[Passage]:
        """Read all text, source by source, the training part of each before its held-out part."""
        for source in self.sources:
            yield from _passages(source)

    def training_sample(self, max_chars: int) -> Iterator[str]:
        """Read an evenly spread, always identical sample of the training text of at most `max_chars`."""
        total = self.training_chars
        seen = taken = 0
        for passage in self.passages():
            if passage.is_heldout:
                continue
            seen += len(passage.text)
            # Bresenham's line: take a passage whenever the sample lags behind its share of what was seen.
            allowed = max_chars if seen >= total else max_chars * seen // total
            if total <= max_chars or taken + len(passage.text) <= allowed:
                taken += len(passage.text)
                yield passage.text


def open_corpus(paths: Sequence[Path]) -> Corpus:
    """Find the text below these files and folders, or raise `CorpusError`."""
    if not paths:
        raise CorpusError("no corpus was given.", hint="Name files or folders of text with --corpus.")
    corpus = _open(paths, accept=lambda path: True)
    if not corpus.sources:
        where = ", ".join(str(path) for path in paths[:3])
        raise CorpusError(f"there is no text in {where}.", hint="--corpus wants UTF-8 text files, or folders of them.")
    return corpus


def stdlib_corpus() -> Corpus:
    """Open the source text of the running Python's standard library: real text that every machine has."""
    folder = Path(sysconfig.get_path("stdlib"))
    corpus = _open([folder], accept=lambda path: path.suffix == ".py", skipped=STDLIB_SKIPPED)
    if not corpus.sources:  # some embedded Pythons ship it compiled, in a zip file
        raise CorpusError(f"this Python has no standard library source in {folder}.", hint="Name text with --corpus.")
    return corpus


def _open(paths: Iterable[Path], *, accept: Callable[[Path], bool], skipped: frozenset[str] = frozenset()) -> Corpus:
    """List the sources below `paths` in an order that is the same on every machine and mixes folders.

    The held-out loss is measured on the first held-out sequences. In alphabetical order these would all
    come from one corner of the corpus; in the order of the hashes of their names they are a fair sample.
    """
    found: dict[Path, tuple[bytes, Source]] = {}
    for root in paths:
        for path in _files(root, accept=accept, skipped=skipped):
            real = path.resolve()
            num_chars = _count_chars(path) if real not in found else 0
            if num_chars:
                name = path.relative_to(root).as_posix() if path != root else path.name
                found[real] = sha256(name.encode(errors="surrogateescape")).digest(), Source(path, num_chars)
    return Corpus(tuple(source for _, source in sorted(found.values(), key=lambda entry: entry[0])))


def _files(root: Path, *, accept: Callable[[Path], bool], skipped: frozenset[str]) -> Iterator[Path]:
    """Walk a file or folder in sorted order. Links are followed, but no folder is entered twice."""
    if not root.exists():
        raise CorpusError(f"there is no file or folder {root}.", hint="Check the path given with --corpus.")
    if not root.is_dir():
        yield root
        return
    entered: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, onerror=_raise_unreadable, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            subfolders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if _is_wanted(name) and name not in skipped)
        for path in (Path(folder, name) for name in sorted(names) if _is_wanted(name)):
            if path.is_file() and accept(path):
                yield path


def _is_wanted(name: str) -> bool:
    """Tell text that somebody meant to share from what tools leave behind (`.git`, `.env`, caches)."""
    return not name.startswith(".") and name != "__pycache__"


def _raise_unreadable(error: OSError) -> None:
    raise CorpusError(f"cannot read {error.filename}: {error.strerror}.") from error


def _count_chars(path: Path) -> int:
    """Count the characters of a text file; a binary one (it holds a NUL byte) counts as empty."""
    count = 0
    for piece in _pieces(path):
        if "\0" in piece:
            return 0
        count += len(piece)
    return count


def _pieces(path: Path) -> Iterator[str]:
    """Decode a file piece by piece, each ending with a line where there are lines."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rest = ""
    try:
        with path.open("rb") as file:
            while block := file.read(PIECE_BYTES):
                rest += decoder.decode(block)
                cut = rest.rfind("\n") + 1 or len(rest)
                if cut:  # else the block ended inside its first character
                    yield rest[:cut]
                    rest = rest[cut:]
    except OSError as error:
        _raise_unreadable(error)
    if rest := rest + decoder.decode(b"", final=True):
        yield rest


def _passages(source: Source) -> Iterator[Passage]:
    """Cut a document into its training and its held-out text, at a line end if one is near."""
    cut = source.num_chars - source.heldout_chars
    position = 0
    is_heldout = starts = False
    for piece in _pieces(source.path):
        start, position = position, position + len(piece)
        if not is_heldout and source.heldout_chars and position > cut:
            at = _near_line_end(piece, cut - start, reach=min(LINE_REACH, source.heldout_chars // 2))
            if at:
                yield Passage(piece[:at], is_heldout=False, starts=start == 0)
            is_heldout, starts, piece = True, True, piece[at:]
            if not piece:  # the line that was cut at ends its piece: held-out text starts with the next one
                continue
        yield Passage(piece, is_heldout=is_heldout, starts=starts if is_heldout else start == 0)
        starts = False


def _near_line_end(text: str, cut: int, *, reach: int) -> int:
    """Move `cut` forward to the start of a line that begins within `reach` characters."""
    if cut == 0 or text[cut - 1] == "\n":
        return cut
    end = text.find("\n", cut, cut + reach)
    return cut if end < 0 else end + 1
