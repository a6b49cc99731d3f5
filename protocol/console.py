"""How every command ends: one clear line and an exit code, never a traceback by surprise.

Owns: turning errors into exit codes, the options and the envelope that commands have in common, and setting up logging
for a command. Shared by `peer`, `coordinator` and `swarm`, so that all three behave alike. Must not know: any command.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

import click
import structlog

from protocol.errors import StorageError, SwarmError

Command = Callable[..., None]

EXIT_BUG = 1
MAX_LOG_BYTES = 64 << 20  # of a log file, of which there are two parts at most
EXIT_INTERRUPTED = 130


def run_command(command: Callable[[], None], *, program: str, debug: bool = False) -> int:
    """Run a command and return its exit code; errors become one line on stderr."""
    try:
        command()
    except SwarmError as error:
        print(f"{program}: {error.one_line()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the one supervisor of a command: whatever gets here is a bug of ours
        if debug:
            traceback.print_exc()
        cause = _innermost(error)
        summary = " ".join(f"{type(cause).__name__}: {cause}".split())
        print(f"{program}: E-BUG {summary[:300]} Run again with --debug and report it, please.", file=sys.stderr)
        return EXIT_BUG
    return 0


def _innermost(error: BaseException) -> BaseException:
    """Return the first real error of a task group's wrapping, which itself says nothing."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def with_debug(command: Command) -> Command:
    return click.option("--debug", is_flag=True, help="Show a traceback if something unexpected happens.")(command)


def with_json(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def print_document(schema: str, data: dict[str, Any]) -> None:
    """Print what `--json` promises: one line."""
    click.echo(json.dumps({"schema": schema, "ok": True, "data": data}, allow_nan=False))


def set_up_logging(*, level: str, file: Path | None = None) -> None:
    """Send structured events of `level` and above to stderr, or as JSON lines to a file.

    Raises `StorageError` if the file cannot be opened.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    stream = LossyStream(sys.stderr if file is None else _open_log(file))
    renderer = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty()) if file is None else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, stream)),
        cache_logger_on_first_use=True,
    )


class LossyStream:
    """Output that loses lines when its disk is full or its terminal gone, rather than stop whoever wrote them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.isatty = stream.isatty

    def write(self, text: str) -> None:
        if not self._stream.closed:
            with contextlib.suppress(OSError):
                self._stream.write(text)

    def flush(self) -> None:
        if not self._stream.closed:
            with contextlib.suppress(OSError):
                self._stream.flush()


class _LogFile:
    """A log that begins anew when it has grown large; one older part is kept. Strangers cause lines in it too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> None:
        if self._num_bytes > MAX_LOG_BYTES and self._path.is_file():  # and no pipe
            self._file.close()
            with contextlib.suppress(OSError):
                os.replace(self._path, self._path.with_name(self._path.name + ".1"))
            self._open()
        self._num_bytes += self._file.write(text)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        self._file = self._path.open("a", buffering=1, encoding="utf-8")
        self._num_bytes = self._path.stat().st_size


def _open_log(file: Path) -> TextIO:
    try:
        return cast(TextIO, _LogFile(file))
    except OSError as error:
        raise StorageError(f"cannot write the log {file}: {error.strerror}.") from None
