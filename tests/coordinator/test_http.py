"""The status over HTTP. Oracles: what `swarm status` says of the same run, and counting what a visitor costs."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path

import pytest

from coordinator import http
from coordinator.app import run_coordinator
from coordinator.http import MAX_VISITORS, serving_status
from coordinator.monitor import local
from coordinator.monitor.local import SharedStatus, status_of_directory
from coordinator.monitor.render import render
from coordinator.settings import CoordinatorSettings
from coordinator.status import Document
from coordinator.store.database import DATABASE_FILE, Database
from protocol.errors import ConfigError, PortError, StorageError, SwarmError
from tests.coordinator.runs import make_run

ANY_PORT = "127.0.0.1:0"


class Source:
    """A document that counts how often it is read."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.reads = 0
        self.error: SwarmError | None = None

    def __call__(self) -> Document:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return self.document


@pytest.fixture
async def source(tmp_path: Path) -> Source:
    run = make_run(tmp_path)
    await (await Database.open(run.path / DATABASE_FILE)).close()
    return Source(status_of_directory(run.path))


@pytest.fixture
def url(source: Source) -> Iterator[str]:
    with serving_status(ANY_PORT, source) as port:
        yield f"http://127.0.0.1:{port}"


def get(url: str) -> tuple[int, str, str]:
    """Return status, content type and body."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def test_the_paths_say_what_the_commands_print(url: str, source: Source) -> None:
    assert get(url + "/") == (200, "text/plain; charset=utf-8", "\n".join(render(source.document)) + "\n")
    status, kind, body = get(url + "/status.json?pretty=no")
    assert (status, kind) == (200, "application/json; charset=utf-8")
    assert json.loads(body) == {"schema": "swarm.status/1", "ok": True, "data": source.document}
    assert get(url + "/health")[::2] == (200, "ok\n")
    assert get(url + "/../coordinator.key")[0] == 404
    assert get(url + "/coordinator.key")[0] == 404


def test_many_visitors_cost_one_look_at_the_database(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_status(ANY_PORT, SharedStatus(source)) as port:
        url = f"http://127.0.0.1:{port}"
        for _ in range(20):
            assert get(url + "/status.json")[0] == 200
        assert source.reads <= 2  # a slow machine may take more than a second for them
        monkeypatch.setattr(local, "FRESH_S", 0.0)
        get(url + "/")
        get(url + "/")
        assert source.reads >= 3


def test_a_database_that_cannot_be_read_is_said_in_one_line(url: str, source: Source) -> None:
    source.error = StorageError("the disk is gone.")
    assert get(url + "/") == (503, "text/plain; charset=utf-8", "E-DISK the disk is gone.\n")
    source.error = None
    assert get(url + "/")[0] == 200


def test_a_full_house_turns_visitors_away_and_recovers(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects and says nothing holds a seat; they are taken in the order of their coming."""
    monkeypatch.setattr(http._Visit, "timeout", 60.0)
    port = int(url.rpartition(":")[2])
    with ExitStack() as visitors:
        for _ in range(MAX_VISITORS):
            visitors.enter_context(socket.create_connection(("127.0.0.1", port)))
        with pytest.raises((urllib.error.URLError, ConnectionError, HTTPException)):
            get(url + "/health")
    for _ in range(50):
        try:
            status = get(url + "/health")[0]
        except (urllib.error.URLError, ConnectionError, HTTPException):
            time.sleep(0.1)  # the seats of those who left are being cleared
            continue
        assert status == 200
        return
    pytest.fail("it never recovered")


def test_ipv6_is_served_too(source: Source) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"this machine has no ::1: {error}")
    with serving_status("[::1]:0", source) as port:
        assert get(f"http://[::1]:{port}/health")[::2] == (200, "ok\n")


@pytest.mark.parametrize("address", ["8080", ":8080", "localhost:", "localhost:http", "localhost:99999", "a:-1"])
def test_what_is_no_address_is_refused(address: str, source: Source) -> None:
    with pytest.raises(ConfigError, match="no address"), serving_status(address, source):
        pass


def test_a_port_in_use_is_refused(url: str, source: Source) -> None:
    with pytest.raises(PortError, match="cannot listen"), serving_status(url.removeprefix("http://"), source):
        pass


async def test_a_coordinator_whose_port_is_taken_does_not_start(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = CoordinatorSettings(http=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(PortError):
            await run_coordinator(run.path, settings, on_invite=lambda invite: None)
