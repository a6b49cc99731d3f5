"""Measure a command instead of a function: a child process per repeat, with a deadline.

Owns: starting the child in its own session, ending it and everything it started, and turning its output
into a figure. Its CPU time is seen by the harness because it is waited for here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.benchmarks.harness import Run

TAIL_BYTES = 2000  # how much of a failed command's stderr is worth showing


class CommandError(Exception):
    """A measured command failed or did not end in time; the message has the end of its stderr."""


def command(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    parse: Callable[[str], float] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Run:
    """Return a repeat that runs `argv` once. `parse` reads its figure from stdout; without it wall time counts.

    `env` is added to the environment of this process.
    """
    full_env = None if env is None else {**os.environ, **env}

    def run_once() -> float | None:
        stdout = checked_output(argv, timeout_s=timeout_s, cwd=cwd, env=full_env)
        return None if parse is None else parse(stdout)

    return run_once


def checked_output(
    argv: Sequence[str | Path], *, timeout_s: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Run `argv` to its end and return its stdout. `env` is all that it gets; raises `CommandError` if it fails."""
    # Files, not pipes: a grandchild that outlives the child would keep a pipe open and us waiting.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise CommandError(f"{argv[0]} did not end within {timeout_s:g} s: {tail(err)}") from None
        finally:
            end_session(child)
        if code != 0:
            raise CommandError(f"{argv[0]} ended with {code}: {tail(err)}")
        out.seek(0)
        return out.read().decode(errors="replace")


def end_session(child: subprocess.Popen[bytes]) -> None:
    """End a child that leads a session of its own, and everything that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM when only zombies are left
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def tail(file: IO[bytes]) -> str:
    """Return the end of what a command wrote."""
    file.seek(0)
    return file.read()[-TAIL_BYTES:].decode(errors="replace").strip()
