"""The status of a run directory, straight from its database, whether or not a coordinator runs there.

Must not know: the network. A directory that was never served still has a manifest, and says so.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

from coordinator.rundir import RunDir
from coordinator.status import document
from coordinator.store.database import DATABASE_FILE, open_readonly


def status_of_directory(directory: Path) -> dict[str, Any]:
    """Return the status document of the run in `directory`, or raise `ConfigError`."""
    run = RunDir.open(directory)
    with closing(open_readonly(directory / DATABASE_FILE)) as db:
        return document(db, run.manifest, now_s=time.time())
