"""What the coordinator's commands share: options that several have, and how a command ends. Knows no command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from protocol.console import run_command
from protocol.errors import ConfigError

SETTING = "SECTION.FIELD=VALUE"

Command = Callable[..., None]


def with_debug(command: Command) -> Command:
    return click.option("--debug", is_flag=True, help="Show a traceback if something unexpected happens.")(command)


def with_json(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


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


def finish(command: Callable[[], None], name: str, debug: bool) -> None:
    """Run a command to its end, and exit."""
    sys.exit(run_command(command, program=f"coordinator {name}", debug=debug))


def print_document(schema: str, data: dict[str, Any]) -> None:
    """Print what `--json` promises: one line."""
    click.echo(json.dumps({"schema": schema, "ok": True, "data": data}, allow_nan=False))
