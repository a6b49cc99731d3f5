"""Child processes of the demo: each in a session of its own, none outlives the demo, killed as a machine dies.

Owns: starting, watching and ending children, and their log files. Must not know: what they do.

A child asks the kernel (Linux: PR_SET_PDEATHSIG) to be killed when the demo dies, however that happens; it does
so in a tiny launcher that then becomes the real program, because code between fork and exec is not safe in a
process with threads. A peer's p2pd ends by itself as soon as its peer is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import LocalFault, StorageError

TERM_TIMEOUT_S = 5.0
MAX_TAIL_BYTES = 4096

# argv: parent pid, program, arguments. The parent may have died before the request: then nobody would be told.
_LAUNCHER = """
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(slots=True)
class Child:
    """One running child."""

    name: str
    process: asyncio.subprocess.Process
    output: Path
    """Where its stderr goes, and its stdout unless it was piped."""
    killed: bool = False
    """On purpose: by us, or by somebody who tries what happens then."""
    is_replaced: bool = False

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.returncode is None

    def kill(self) -> None:
        """Kill it and everything in its process group with SIGKILL: what a power cut looks like to others."""
        self.killed = True
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def last_line(self) -> str:
        """Return the last line that it wrote, which is where its error would be."""
        try:
            with self.output.open("rb") as file:
                file.seek(max(0, self.output.stat().st_size - MAX_TAIL_BYTES))
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _signal(self, number: signal.Signals) -> None:
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


async def start_child(
    name: str, arguments: Sequence[str], *, logs: Path, environment: Mapping[str, str], pipe_stdout: bool = False
) -> Child:
    """Start `python -m ...` with these arguments. Raises `LocalFault` or `StorageError` if that is impossible."""
    output = logs / f"{name}.out"
    try:
        file = output.open("ab")
    except OSError as error:
        raise StorageError(f"cannot write {output}: {error.strerror}.") from error
    with file:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", "-c", _LAUNCHER, str(os.getpid()), sys.executable, *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if pipe_stdout else file,
                stderr=file,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            raise LocalFault(f"cannot start {name}: {error.strerror}.") from error
    return Child(name, process, output)


async def end_children(children: Sequence[Child], *, timeout_s: float = TERM_TIMEOUT_S) -> None:
    """End all of them: ask, wait, then kill."""
    for child in children:
        child.terminate()
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(child.process.wait() for child in children))
    except TimeoutError:
        for child in children:
            child.kill()
        await asyncio.gather(*(child.process.wait() for child in children))
