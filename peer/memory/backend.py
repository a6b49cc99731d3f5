"""The device as the memory engine sees it: somewhere to allocate, and two directions to copy in.

Owns: the interface and the CPU's side of it, where the device tier is a budget in host memory and copies are real
ones. Must not know: units, slots, schedules. Copies are called in transfer threads and return when the bytes are
there; they release the GIL.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import structlog
import torch
from torch import Tensor

from peer.memory.disk.direct_io import aligned_buffer
from peer.memory.pages import padded
from protocol.errors import LocalFault

log = structlog.get_logger()

Event = Any
"""What `record` returns and copies wait for."""


class Backend(Protocol):
    """One device."""

    device: torch.device
    is_host_memory: bool
    """Whether the device's buffers can be read and written by the processor, so that a disk needs no staging."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Return a buffer of the device: uint8, zeros, page aligned, padded to whole pages."""

    def allocate_host(self, num_bytes: int) -> Tensor:
        """Return a buffer of the host from which the device can copy at full speed."""

    def close(self) -> None:
        """Give back what the system holds for host buffers. They must not be copied to or from any more."""

    def record(self) -> Event:
        """Mark what has been computed so far."""

    def to_device(self, target: Tensor, source: Tensor, after: Event) -> None:
        """Copy host bytes to the device once `after` has happened."""

    def to_host(self, target: Tensor, source: Tensor, after: Event) -> None:
        """Copy device bytes to the host once `after` has happened."""

    def widen(self, target: Tensor, source: Tensor, after: Event) -> None:
        """Copy bf16 in host memory to fp32 on the device (both as flat bytes)."""

    def narrow(self, target: Tensor, source: Tensor, after: Event) -> None:
        """Copy fp32 values on the device that are bf16 values to bf16 in host memory (both as flat bytes)."""


class CpuBackend:
    """The processor as the device."""

    device = torch.device("cpu")
    is_host_memory = True

    def allocate(self, num_bytes: int) -> Tensor:
        return host_buffer(num_bytes)

    def allocate_host(self, num_bytes: int) -> Tensor:
        return host_buffer(num_bytes)

    def close(self) -> None:
        pass

    def record(self) -> Event:
        return None

    def to_device(self, target: Tensor, source: Tensor, after: Event) -> None:
        copy_bytes(target, source)

    def to_host(self, target: Tensor, source: Tensor, after: Event) -> None:
        copy_bytes(target, source)

    def widen(self, target: Tensor, source: Tensor, after: Event) -> None:
        bits = target.numpy().view(np.uint32)
        np.left_shift(source.numpy().view(np.uint16), 16, out=bits, dtype=np.uint32, casting="unsafe")

    def narrow(self, target: Tensor, source: Tensor, after: Event) -> None:
        np.copyto(target.numpy().view(np.uint16), source.numpy().view(np.uint16)[1::2])  # the upper halves


class CudaBackend:
    """A CUDA device. Not run on one yet; its tests need one.

    Copies go over a stream per direction, from and to pinned memory, and wait for events instead of for the device.
    """

    is_host_memory = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        stream: Any = torch.cuda.Stream  # torch leaves it untyped
        self._in, self._out = stream(device), stream(device)
        self._pinned: list[Tensor] = []  # kept alive: memory that is given back while it is pinned stays pinned

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.zeros(padded(num_bytes), dtype=torch.uint8, device=self.device)

    def allocate_host(self, num_bytes: int) -> Tensor:
        buffer = host_buffer(num_bytes)
        # pinned in place: torch's own pinned allocations round up to powers of two
        status = _cuda_runtime().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
        if int(status) != 0:
            raise LocalFault(f"cannot pin {num_bytes} bytes of host memory (CUDA error {int(status)}).")
        self._pinned.append(buffer)
        return buffer

    def close(self) -> None:
        while self._pinned:
            buffer = self._pinned.pop()
            status = _cuda_runtime().cudaHostUnregister(buffer.data_ptr())
            if int(status) != 0:  # of a context that a fault has ended, as a rule: nothing is to be done about it
                log.warning("memory.not_unpinned", num_bytes=buffer.numel(), cuda_error=int(status))

    def record(self) -> Event:
        return torch.cuda.current_stream(self.device).record_event()

    def to_device(self, target: Tensor, source: Tensor, after: Event) -> None:
        self._copy(self._in, target, source, after)

    def to_host(self, target: Tensor, source: Tensor, after: Event) -> None:
        self._copy(self._out, target, source, after)

    def widen(self, target: Tensor, source: Tensor, after: Event) -> None:
        # allocated on the stream that fills it: on another one, its memory may still be in use by what freed it there
        with torch.cuda.stream(self._in):
            narrow = torch.empty(source.numel(), dtype=torch.uint8, device=self.device)
        self._copy(self._in, narrow, source, after, then=lambda: _values(target).copy_(narrow.view(torch.bfloat16)))

    def narrow(self, target: Tensor, source: Tensor, after: Event) -> None:
        with torch.cuda.stream(self._out):
            self._out.wait_event(after)
            narrow = _values(source).to(torch.bfloat16).view(torch.uint8)
            self._copy(self._out, target, narrow, self._out.record_event())

    def _copy(
        self,
        stream: torch.cuda.Stream,
        target: Tensor,
        source: Tensor,
        after: Event,
        *,
        then: Callable[[], object] = lambda: None,
    ) -> None:
        with torch.cuda.stream(stream):
            stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            then()
            done = stream.record_event()
        done.synchronize()  # of this transfer thread alone; computing goes on


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call, unused-ignore]


def _values(flat_bytes: Tensor) -> Tensor:
    return flat_bytes.view(torch.float32)


def backend_for(device: str) -> Backend:
    """Return the backend of a torch device."""
    return CudaBackend(torch.device(device)) if device.startswith("cuda") else CpuBackend()


def host_buffer(num_bytes: int) -> Tensor:
    """Return page-aligned memory (torch itself aligns to 64 bytes, which a disk's direct I/O refuses)."""
    return torch.frombuffer(aligned_buffer(max(num_bytes, 1)), dtype=torch.uint8)


def give_back_free_memory() -> None:
    """Return what the C library keeps for later to the system, where it can do that (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """Copy on this thread alone: torch would start a team of threads for every thread that copies."""
    np.copyto(target.numpy(), source.numpy())
