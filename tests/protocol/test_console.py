"""How commands end, and output that nobody reads any more."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from protocol import console
from protocol.console import EXIT_BUG, LossyStream, run_command
from protocol.errors import ConfigError


def test_an_error_of_ours_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise ConfigError("that is no folder.", hint="Choose another.")

    assert run_command(command, program="peer join") == ConfigError.exit_code
    assert capsys.readouterr().err == f"peer join: {ConfigError.code} that is no folder. Choose another.\n"


def test_a_bug_inside_task_groups_is_named_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the innermost error; "unhandled errors in a TaskGroup" helps nobody who reads a report."""

    def command() -> None:
        raise ExceptionGroup("outer", [ExceptionGroup("inner", [ZeroDivisionError("by zero")])])

    assert run_command(command, program="peer join") == EXIT_BUG
    assert "E-BUG ZeroDivisionError: by zero" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk_is_lost_and_nothing_else() -> None:
    file = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115 - closing it is what fails
    stream = LossyStream(file)
    stream.write("a line\n")
    stream.flush()
    with pytest.raises(OSError, match="No space"):  # so there was something to lose
        file.close()


def test_output_to_a_closed_stream_is_lost_and_nothing_else() -> None:
    file = io.StringIO()
    stream = LossyStream(file)
    file.close()
    stream.write("a line")
    stream.flush()


def test_a_log_begins_anew_when_it_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the lines of both parts, and that there are no more parts."""
    monkeypatch.setattr(console, "MAX_LOG_BYTES", 1000)
    path = tmp_path / "log"
    file = console._open_log(path)
    log = console.LossyStream(file)
    for number in range(200):
        log.write(f"line {number:03}\n")
    file.close()
    older = tmp_path / "log.1"
    assert sorted(tmp_path.iterdir()) == [path, older]
    assert max(path.stat().st_size, older.stat().st_size) <= 1000 + len("line 000\n")
    lines = (older.read_text() + path.read_text()).splitlines()
    assert lines == [f"line {number:03}" for number in range(200 - len(lines), 200)]
    console._open_log(path).close()
    assert path.stat().st_size > 0, "what is there is kept"


def test_a_log_that_is_no_file_is_written_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "MAX_LOG_BYTES", 1)
    log = console._open_log(Path(os.devnull))
    log.write("a line\n")
    log.write("another\n")
    log.close()
