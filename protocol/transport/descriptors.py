"""How many sockets and files this process may have open.

Owns: raising that limit. Every stream of ours is a socket to p2pd, and the limits of `streams.py` are only worth
something while the system grants as many: most processes start with 1,024.
"""

from __future__ import annotations

import contextlib
import sys

if sys.platform != "win32":  # which has no such limit
    import resource


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open descriptors to the hard one. p2pd inherits it; where it is fixed, it stays."""
    if sys.platform == "win32":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS names a hard limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
