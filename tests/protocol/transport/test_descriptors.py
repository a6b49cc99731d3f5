"""The limit of open descriptors is raised as far as the system lets us."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from protocol.transport.descriptors import raise_descriptor_limit


@pytest.fixture
def hard() -> Iterator[int]:
    """The hard limit, under a soft one that is lowered for the test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_becomes_the_hard_one(hard: int) -> None:
    raise_descriptor_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_a_system_that_does_not_grant_it_is_no_obstacle(hard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: no error, and the limit as it was."""

    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_descriptor_limit()
    monkeypatch.undo()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256
