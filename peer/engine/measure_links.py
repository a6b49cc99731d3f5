"""Measure how fast bytes come to the device and go from it, and what that takes from computing beside it.

Owns: the probes of host memory and of a drive. Must not know: models, plans; the work to be disturbed is given.

A drive is measured through the store that training will use, checksums included, for as long as a few hundred MB take,
or as much as there is room for. That is within every drive's fast cache; once that is full, after some 100 GB, cheap
drives write at a third.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from peer.engine.stopwatch import once_s, run_s
from peer.memory.backend import Backend
from peer.memory.disk.store import NvmeStore, UnitSpec, required_bytes
from peer.memory.pages import PAGE_BYTES
from peer.memory.planning.budgets import free_disk_bytes
from peer.memory.planning.profile import Link
from peer.memory.units import ELEMENT_BYTES
from protocol.errors import ConfigError
from protocol.sizes import size_text

COPY_BYTES = 64 << 20
DRIVE_UNIT_BYTES = 32 << 20
LEAST_DRIVE_UNIT_BYTES = 1 << 20  # shorter ones would measure the calls
DRIVE_UNITS = 8


def memory_bytes_per_s(backend: Backend) -> float:
    """Return how fast the device's memory is written."""
    buffer = torch.empty(COPY_BYTES // ELEMENT_BYTES, device=backend.device)
    return COPY_BYTES / run_s(lambda _: buffer.zero_(), repeats=5)


def host_link(backend: Backend, busy: Callable[[Tensor], object]) -> Link:
    """Measure host memory, with `busy` being what it may disturb."""
    on_device, on_host = backend.allocate(COPY_BYTES), backend.allocate_host(COPY_BYTES)

    def come(_: Tensor) -> None:
        backend.to_device(on_device, on_host, backend.record())

    def go(_: Tensor) -> None:
        backend.to_host(on_host, on_device, backend.record())

    in_s, out_s = run_s(come, repeats=5), run_s(go, repeats=5)
    share = _compute_share(lambda: come(on_device), busy) if backend.is_host_memory else 0.0
    return Link(in_bytes_per_s=COPY_BYTES / in_s, out_bytes_per_s=COPY_BYTES / out_s, compute_share=share)


def drive_link(folder: Path, backend: Backend, busy: Callable[[Tensor], object]) -> Link:
    """Measure a drive through a store of its own, which is removed afterwards."""
    unit_bytes = _drive_unit_bytes(folder)
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="handcar-probe-", dir=folder))
    try:
        with NvmeStore.open(place, _drive_units(unit_bytes), fingerprint="probe") as store:
            buffer, on_device = backend.allocate_host(unit_bytes), backend.allocate(unit_bytes)
            bytes_of = buffer.numpy().data
            is_staged = not backend.is_host_memory

            def write(number: int) -> None:
                if is_staged:
                    backend.to_host(buffer, on_device, backend.record())
                store.write(number, bytes_of)

            def read(number: int) -> None:
                store.read(number, bytes_of)
                if is_staged:
                    backend.to_device(on_device, buffer, backend.record())

            for number in range(DRIVE_UNITS):  # the first time takes longer, and training writes again and again
                write(number)
            write_s = [once_s(lambda number=number: write(number)) for number in range(DRIVE_UNITS)]  # type: ignore[misc]
            read_s = [once_s(lambda number=number: read(number)) for number in range(DRIVE_UNITS)]  # type: ignore[misc]
            share = _compute_share(lambda: read(0), busy) if backend.is_host_memory else 0.0
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return Link(
        in_bytes_per_s=unit_bytes / statistics.median(read_s),
        out_bytes_per_s=unit_bytes / statistics.median(write_s),
        compute_share=share,
    )


def _drive_units(unit_bytes: int) -> list[UnitSpec]:
    return [UnitSpec(f"probe.{number}", unit_bytes, durable=False) for number in range(DRIVE_UNITS)]


def _drive_unit_bytes(folder: Path) -> int:
    """Return how long the pieces may be that a drive is measured with: shorter ones on a drive that is almost full.

    Raises `ConfigError` if there is no room for any that would tell something.
    """
    free_bytes = free_disk_bytes(folder)
    missing_bytes = required_bytes(_drive_units(LEAST_DRIVE_UNIT_BYTES)) - free_bytes
    if missing_bytes > 0:
        raise ConfigError(
            f"the drive of {folder} is too full to be measured: {size_text(missing_bytes)} of free space are missing.",
            hint="Free some disk space there, or choose another folder.",
        )
    beside_bytes = required_bytes(_drive_units(PAGE_BYTES)) - DRIVE_UNITS * PAGE_BYTES
    return min(DRIVE_UNIT_BYTES, (free_bytes - beside_bytes) // DRIVE_UNITS // PAGE_BYTES * PAGE_BYTES)


def _compute_share(copy: Callable[[], object], busy: Callable[[Tensor], object]) -> float:
    """Return which share of computing is lost while copies run beside it."""
    alone_s = run_s(busy)
    with _repeating(copy):
        beside_s = run_s(busy)
    return min(0.9, max(0.0, 1 - alone_s / beside_s))


@contextmanager
def _repeating(copy: Callable[[], object]) -> Iterator[None]:
    """Copy in a thread again and again."""
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.is_set():
            copy()

    thread = threading.Thread(target=loop, name="handcar-probe", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
