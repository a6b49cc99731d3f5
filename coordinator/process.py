"""The coordinator as a process of an operating system: one per directory, stoppable, with one error at a time.

Owns: the directory's lock, signals, and picking the telling error out of a task group. Must not know: what the
process does.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from protocol.errors import StorageError, SwarmError

LOCK = "coordinator.lock"
EXIT_INTERRUPTED = 130


@contextmanager
def directory_lock(folder: Path) -> Iterator[None]:
    """Hold a run directory for this process: two coordinators with one key would fight for it."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(f"another coordinator is running in {folder}.", hint="Stop it first.") from None
        yield
    finally:
        os.close(descriptor)


@asynccontextmanager
async def interruptible() -> AsyncIterator[asyncio.Event]:
    """Turn the first SIGINT or SIGTERM into an event; the second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(EXIT_INTERRUPTED)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def unwrapped(work: Coroutine[Any, Any, None]) -> None:
    """Await work made of task groups; raise the first error of our tree out of their wrapping."""
    try:
        await work
    except BaseExceptionGroup as group:
        found = _first_known(group)
        if found is None:
            raise
        raise found from group


def run_loop(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end, on uvloop where there is one."""
    runner: Callable[[Coroutine[Any, Any, Any]], Any]
    try:
        import uvloop
    except ImportError:
        runner = asyncio.run
    else:
        runner = uvloop.run
    return runner(main)


def _first_known(group: BaseExceptionGroup[BaseException]) -> SwarmError | None:
    for error in group.exceptions:
        found = _first_known(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, SwarmError):
            return found
    return None
