"""What the coordinator's commands share: words that several take, and how a command ends. Knows no command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from protocol.console import run_command
from protocol.errors import ConfigError

SETTING = "SECTION.FIELD=VALUE"

DIRECTORY = click.Path(path_type=Path, file_okay=False)
UNITS_S = {"m": 60, "h": 3600, "d": 86_400}
MAX_TEXT_CHARS = 200

T = TypeVar("T")


def parse_settings(words: tuple[str, ...]) -> dict[str, Any]:
    """Parse `SECTION.FIELD=VALUE` words; values are JSON, or text where they are not."""
    parsed: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{word}' is not a setting.", hint=f"Write it like --set {SETTING}.")
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return parsed


def parse_duration(text: str, option: str) -> float:
    """Return the seconds of a duration like `30m`, or raise `ConfigError` naming the option."""
    found = re.fullmatch(r"(\d{1,6})([mhd])", text.strip().lower(), re.ASCII)
    if found is None or int(found[1]) == 0:
        raise ConfigError(f"{option}: '{text[:20]}' is no time.", hint="Write it like 30m, 12h or 7d.")
    return float(int(found[1]) * UNITS_S[found[2]])


def check_text(text: str, option: str) -> None:
    """Raise `ConfigError` unless a text can be shown in a line."""
    if len(text) > MAX_TEXT_CHARS or not text.isprintable():
        raise ConfigError(f"{option}: at most {MAX_TEXT_CHARS} printable characters.")


def write_database(directory: Path, function: Callable[[Any], T]) -> T:
    """Change a run's database in one transaction, whether or not a coordinator runs; `ConfigError` if it has none."""
    import asyncio

    from coordinator.store.database import DATABASE_FILE, Database

    if not (directory / DATABASE_FILE).exists():
        raise ConfigError(f"{directory} was never served.", hint=f"Start it: coordinator run {directory}")

    async def write() -> T:
        database = await Database.open(directory / DATABASE_FILE)
        try:
            return await database.run(function)
        finally:
            await database.close()

    return asyncio.run(write())


def finish(command: Callable[[], None], name: str, debug: bool) -> None:
    """Run a command to its end, and exit."""
    sys.exit(run_command(command, program=f"coordinator {name}", debug=debug))
