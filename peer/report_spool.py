"""Reports on disk, one small file each, until the coordinator has them: a peer may be restarted while it is away.

Owns: the files and their order. Must not know: what is in a report, or when it is acknowledged (`reports.py`).

Nothing is synced: what a kill leaves behind is whole, and a power cut costs the receipts of the last seconds, which
are not worth a wait of the drive at every round. A disk that refuses costs no training either; it is said once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import structlog

from protocol.control import NumberedReport
from protocol.errors import WireError

log = structlog.get_logger()

SUFFIX = ".report"
FILE_MODE, FOLDER_MODE = 0o600, 0o700


class ReportSpool:
    """The reports of one peer in one run that wait for the coordinator."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_refused = False

    def load(self) -> Iterator[tuple[NumberedReport, int]]:
        """Read what an earlier process left, oldest first, with sizes; what is damaged is passed over, and said."""
        try:
            paths = sorted(path for path in self._folder.iterdir() if path.suffix == SUFFIX)
        except FileNotFoundError:
            return
        except OSError as error:
            self._refuse(error)
            return
        for path in paths:
            try:
                data = path.read_bytes()
                yield NumberedReport.from_bytes(data), len(data)
            except WireError as error:
                log.warning("reports.damaged", file=path.name, error=str(error))
            except OSError as error:
                self._refuse(error)

    def put(self, sequence: int, data: bytes) -> None:
        """Write a report, whole or not at all."""
        path = self._path(sequence)
        unfinished = path.with_suffix(".part")
        try:
            self._folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE), "wb") as file:
                file.write(data)
            unfinished.replace(path)
        except OSError as error:
            self._refuse(error)

    def drop(self, sequence: int) -> None:
        """Forget a report that is safe elsewhere, or that there is no room for."""
        try:
            self._path(sequence).unlink(missing_ok=True)
        except OSError as error:
            self._refuse(error)

    def _path(self, sequence: int) -> Path:
        return self._folder / f"{sequence:020d}{SUFFIX}"

    def _refuse(self, error: OSError) -> None:
        if not self._is_refused:
            log.warning("reports.unspooled", folder=str(self._folder), error=error.strerror)
        self._is_refused = True
