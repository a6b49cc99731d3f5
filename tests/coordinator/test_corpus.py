"""coordinator/corpus.py: which files count, how they become text, and where they are cut."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import coordinator.corpus as module
from coordinator.corpus import Corpus, Passage, Source, open_corpus, stdlib_corpus
from protocol.errors import CorpusError


def _names(corpus: Corpus) -> set[str]:
    return {source.path.name for source in corpus.sources}


def _text(passages: list[Passage], *, heldout: bool) -> str:
    return "".join(passage.text for passage in passages if passage.is_heldout is heldout)


def _file(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_folders_are_searched_and_what_tools_leave_behind_is_skipped(tmp_path: Path) -> None:
    """Oracle: by hand; text in nested folders counts, caches, hidden files and binaries do not."""
    for name in ("b.txt", "sub/a.txt", "sub/deep/c.py", ".git/config", "__pycache__/x.py", ".env"):
        _file(tmp_path / name, f"this is {name}\n")
    _file(tmp_path / "picture.png", b"\x89PNG\x00\x00")
    _file(tmp_path / "late.bin", b"a" * 3_000_000 + b"\0")  # the NUL comes in a later piece
    _file(tmp_path / "empty.txt", "")
    assert _names(open_corpus([tmp_path])) == {"b.txt", "a.txt", "c.py"}


def test_a_hidden_file_counts_when_it_is_named(tmp_path: Path) -> None:
    """Oracle: who names it, means it."""
    assert _names(open_corpus([_file(tmp_path / ".notes", "text\n")])) == {".notes"}


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    """Oracle: a folder, a file in it, and a link to it are one text; twice would be trained on twice."""
    file = _file(tmp_path / "a" / "one.txt", "text\n")
    (tmp_path / "link.txt").symlink_to(file)
    assert len(open_corpus([tmp_path, tmp_path / "a", file]).sources) == 1


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    """Oracle: a folder elsewhere is reached through a link; a link to a parent does not hang."""
    _file(tmp_path / "elsewhere" / "far.txt", "text\n")
    _file(tmp_path / "corpus" / "near.txt", "text\n")
    (tmp_path / "corpus" / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "self").symlink_to(tmp_path / "corpus")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "gone").symlink_to(tmp_path / "nowhere")
    assert _names(open_corpus([tmp_path / "corpus"])) == {"near.txt", "far.txt"}


def test_special_files_are_not_opened(tmp_path: Path) -> None:
    """Oracle: reading a pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe.txt")
    _file(tmp_path / "a.txt", "text\n")
    assert _names(open_corpus([tmp_path])) == {"a.txt"}


def test_the_order_does_not_depend_on_where_the_corpus_lies(tmp_path: Path) -> None:
    """Oracle: two copies of one tree give the same order, and it is not the alphabetical one."""
    for root in ("one", "two/deeper"):
        for index in range(20):
            _file(tmp_path / root / f"{index:02d}.txt", f"text {index}\n")
    orders = [[source.path.name for source in open_corpus([tmp_path / root]).sources] for root in ("one", "two/deeper")]
    assert orders[0] == orders[1]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("make", ["missing", "empty folder", "empty file", "binary", "nothing"])
def test_no_text_is_one_clear_line(tmp_path: Path, make: str) -> None:
    """Oracle: exit code 3 and a message that names the path."""
    path = tmp_path / "corpus"
    if make == "empty folder":
        path.mkdir()
    elif make == "empty file":
        _file(path, "")
    elif make == "binary":
        _file(path, b"\0\1\2")
    with pytest.raises(CorpusError) as caught:
        open_corpus([] if make == "nothing" else [path])
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.one_line()
    assert make == "nothing" or str(path) in str(caught.value)


def test_undecodable_bytes_become_replacement_characters(tmp_path: Path) -> None:
    """Oracle: Python's own `errors="replace"` on the whole file."""
    raw = b"caf\xe9 \xff\xfe ok \xf0\x9f\x99\x82\n" * 20 + b"\xe2\x82"
    corpus = open_corpus([_file(tmp_path / "latin.txt", raw)])
    passages = list(corpus.passages())
    assert _text(passages, heldout=False) + _text(passages, heldout=True) == raw.decode(errors="replace")


@given(
    lines=st.lists(st.text("ab é\n🙂\r", max_size=30), max_size=200),
    piece_bytes=st.integers(1, 300),
)
def test_nothing_is_lost_or_doubled_and_two_percent_are_held_out(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], piece_bytes: int
) -> None:
    """Oracle: the file's text, whole; pieces cut anywhere, also inside a character."""
    text = "".join(lines)
    path = _file(tmp_path_factory.mktemp("corpus") / "a.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_BYTES", piece_bytes)
        passages = list(Corpus((Source(path, len(text)),)).passages())
    training, heldout = _text(passages, heldout=False), _text(passages, heldout=True)
    assert training + heldout == text
    wanted = len(text) // 50
    assert wanted - wanted // 2 <= len(heldout) <= wanted
    assert all(passage.text for passage in passages)
    for part in (False, True):
        starts = [passage.starts for passage in passages if passage.is_heldout is part]
        assert starts == [True] + [False] * (len(starts) - 1) or not starts


def test_the_cut_moves_to_the_next_line_if_that_is_near(tmp_path: Path) -> None:
    """Oracle: by hand; 2 % of 100 lines of 50 characters are 100, and line 98 begins exactly there."""
    lines = [f"{index:048d}.\n" for index in range(100)]
    (passages,) = [list(open_corpus([_file(tmp_path / "a.txt", "".join(lines))]).passages())]
    assert _text(passages, heldout=True) == "".join(lines[98:])
    moved = ["x" * 20 + "\n", *lines]  # 2 % are 100 of 5,021 characters: two lines again, on their boundary
    (passages,) = [list(open_corpus([_file(tmp_path / "b.txt", "".join(moved))]).passages())]
    assert _text(passages, heldout=True) == "".join(lines[98:])
    longer = [*lines, "y" * 30 + "\n"]  # 2 % are 100 of 5,031: the cut falls into line 98 and moves to 99
    (passages,) = [list(open_corpus([_file(tmp_path / "c.txt", "".join(longer))]).passages())]
    assert _text(passages, heldout=True) == "".join(longer[99:])


def test_text_without_lines_is_cut_where_the_share_ends(tmp_path: Path) -> None:
    """Oracle: by hand; 20 of 1,000 characters."""
    passages = list(open_corpus([_file(tmp_path / "a.txt", "x" * 1000)]).passages())
    assert len(_text(passages, heldout=True)) == 20


def test_a_sample_is_spread_over_all_files_and_always_the_same(tmp_path: Path) -> None:
    """Oracle: at most the wanted size and nearly that, from the first half and the last half of the files alike."""
    for index in range(100):
        _file(tmp_path / f"{index}.txt", f"{index:03d}\n" * 250)
    corpus = open_corpus([tmp_path])
    sample = list(corpus.training_sample(20_000))
    assert 18_000 < sum(map(len, sample)) <= 20_000
    assert sample == list(corpus.training_sample(20_000))
    order = [source.path.stem.zfill(3) for source in corpus.sources]
    places = [order.index(text[:3]) for text in sample]
    assert sum(place < 50 for place in places) == pytest.approx(len(places) / 2, abs=2)


def test_a_small_corpus_is_its_own_sample(tmp_path: Path) -> None:
    """Oracle: all training text, none of the held-out text."""
    corpus = open_corpus([_file(tmp_path / "a.txt", "word\n" * 1000)])
    assert "".join(corpus.training_sample(10_000_000)) == "word\n" * 980


def test_the_standard_library_is_megabytes_of_python_and_not_its_tests() -> None:
    """Oracle: what everybody has: json and asyncio are there, test folders and site-packages are not."""
    corpus = stdlib_corpus()
    paths = [source.path.as_posix() for source in corpus.sources]
    assert corpus.training_chars > 5_000_000
    assert any(path.endswith("json/decoder.py") for path in paths)
    assert any(path.endswith("asyncio/tasks.py") for path in paths)
    assert all(path.endswith(".py") for path in paths)
    assert not any("/test/" in path or "/site-packages/" in path or "/dist-packages/" in path for path in paths)
