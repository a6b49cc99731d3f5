"""Fixtures of the tests with real processes: a small real corpus, and the end of the process server."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import stop_server


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two modules of the standard library: some 200 kB of real text, of which 2 % are held out."""
    folder = tmp_path_factory.mktemp("corpus")
    for module in (argparse, inspect):
        (folder / f"{module.__name__}.txt").write_text(inspect.getsource(module), encoding="utf-8")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_server_left_behind() -> Iterator[None]:
    yield
    stop_server()
