"""How much a peer takes on at once: smaller waves when its memory is full, and where that is no help a pause.

Owns: the size of waves, telling "memory is full" from bugs, and why this machine needs a pause. Must not know: stages,
microbatches. Every method is called from the compute thread, unless it says otherwise.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import torch

from peer.memory.disk.wear import WriteBudgetSpent
from peer.memory.executor import Executor, Pause
from protocol.errors import LocalFault

log = structlog.get_logger()

MEMORY_PAUSE_S = 300.0  # after which whatever took the memory may have ended
MEMORY_HINT = "Close what else uses this device, or host fewer stages (--stage)."


class Headroom:
    """What this machine has room for at the moment."""

    def __init__(self, *, wave: int, memory: Executor | None) -> None:
        self.wave = wave
        """How many microbatches should pass the span together."""
        self._memory = memory
        self._pause: Pause | None = None

    @contextmanager
    def guarding(self, size: int) -> Iterator[None]:
        """Say in our own words that the device is full: a wave of `size` may do well elsewhere, or later."""
        try:
            yield
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            self._note_full(error, size)
            raise LocalFault(_full(error), hint=MEMORY_HINT) from None

    def note_fault(self, error: Exception) -> bool:
        """Take note of an error outside of a microbatch; tell whether this machine needs a pause because of it."""
        if isinstance(error, WriteBudgetSpent):
            self._pause = Pause(str(error), error.resumes_in_s)
        elif is_out_of_memory(error):
            self._note_full(error, size=1)
        else:
            return False
        return True

    def pause(self) -> Pause | None:
        """Return why this peer should stop for a while, if it should. May be called from any thread."""
        if self._pause is not None or self._memory is None:
            return self._pause
        return self._memory.pause()

    def _note_full(self, error: Exception, size: int) -> None:
        """Take smaller waves, and where that is no help a pause: something else uses the device."""
        if size > 1:
            self.wave = min(self.wave, max(1, size // 2))
            log.warning("memory.smaller_waves", wave=self.wave, reason=_full(error))
        else:
            self._pause = Pause(_full(error), MEMORY_PAUSE_S)


def is_out_of_memory(error: Exception) -> bool:
    """Tell torch's and the system's ways of saying that memory is full from everything else."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _full(error: Exception) -> str:
    return f"out of memory: {' '.join(str(error).split())[:200]}"
