"""protocol/sizes.py: what people write is what is meant, and what is written can be read.

Oracle: arithmetic on paper.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ConfigError
from protocol.sizes import parse_size, size_text


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("6GiB", 6 * 2**30),
        ("8 GB", 8 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5gib", 3 * 2**29),
        ("100KB", 100_000),
        ("2T", 2 << 40),
        ("3g", 3 * 2**30),
        ("0", 0),
        ("17 B", 17),
        (" 4 MiB ", 4 * 2**20),
    ],
)
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no size"),
        ("many", "is no size"),
        ("-1GiB", "is no size"),
        ("6 GiB free", "is no size"),
        ("1e9B", "is no size"),
        ("٣GiB", "is no size"),
        ("6", "has no unit"),
        ("9999999TiB", "more than any machine has"),
    ],
)
def test_nonsense_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        parse_size(text, what="--host-memory")
    assert error.value.one_line().startswith("E-CFG --host-memory: ")
    assert "6GiB" in error.value.hint


@given(st.integers(0, 1 << 50))
def test_what_is_written_is_read_as_about_the_same(num_bytes: int) -> None:
    assert parse_size(size_text(num_bytes).replace(",", "")) == pytest.approx(num_bytes, rel=0.06, abs=1)
