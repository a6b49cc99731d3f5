"""A `coordinator` command with one thing wrong with it.

    python -m tests.e2e.odd_coordinator proven:10000 run DIR ...   takes everybody for one that was right so often
    python -m tests.e2e.odd_coordinator blind: run DIR ...         audits nobody, and hears nothing that is for audits

Everything else is the real command.
"""

from __future__ import annotations

import functools
import sys

from coordinator import cli
from coordinator.audit import office
from coordinator.audit.office import AuditOffice
from coordinator.audit.policy import Standing


def main() -> None:
    """Entry point: take the first argument off, go wrong in that way, be a coordinator."""
    oddity, _, value = sys.argv.pop(1).partition(":")
    if oddity == "proven":
        _trust(int(value))
    elif oddity == "blind":
        _look_away()
    else:
        raise ValueError(f"no oddity is called '{oddity}'")
    cli.main()


def _trust(valid: int) -> None:
    office.Standing = functools.partial(Standing, valid=valid, audited=valid)  # type: ignore[attr-defined, assignment]


def _look_away() -> None:
    async def tick(self: AuditOffice) -> None:
        """Draw nothing."""

    AuditOffice.tick = tick  # type: ignore[method-assign]
    for name in ("hear", "hear_receipts", "hear_commit"):
        setattr(AuditOffice, name, lambda self, *what: None)


if __name__ == "__main__":
    main()
