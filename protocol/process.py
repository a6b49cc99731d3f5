"""A long-running command as a process of the operating system: one per folder, stoppable, with one error at a time.

Owns: the folder's lock, signals, the event loop, and picking the telling error out of a task group. Shared by
`peer` and `coordinator`, so that Ctrl-C means the same to both. Must not know: what the process does.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from protocol.console import EXIT_INTERRUPTED
from protocol.errors import StorageError, SwarmError

T = TypeVar("T")


@contextmanager
def folder_lock(path: Path, *, owner: str, otherwise: str) -> Iterator[None]:
    """Hold the lock file `path` for this process: two processes with one key would fight for its folder.

    Raises `StorageError` if the folder cannot be written or another `owner` runs there; `otherwise` says what
    to do then.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}.", hint=otherwise) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(f"another {owner} is running in {folder}.", hint=otherwise) from None
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


async def until_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what `work` brings, or None once `stop` is set, after `work` has been cancelled. Raises what it raises."""
    working, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        working.cancel()
        await asyncio.wait({working})
        if not working.cancelled() and (error := working.exception()) is not None:
            raise error  # its cleaning up went wrong
        return None
    finally:
        working.cancel()  # if we are cancelled ourselves
        stopped.cancel()


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
