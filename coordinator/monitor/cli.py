"""The `swarm` command: what anybody may see of a run.

Parses and prints. The status comes from the coordinator over the network (INVITE) or, on the organiser's
machine, from the run directory's database (DIR), also while no coordinator runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from protocol.console import run_command, with_debug, with_json
from protocol.errors import ConfigError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="handcar")
def swarm() -> None:
    """Look at a Handcar run."""


@swarm.command()
@click.argument("source", metavar="INVITE|DIR")
@with_json
@with_debug
def status(source: str, as_json: bool, debug: bool) -> None:
    """Show round, losses, speed, stages and peers of a run.

    Example: swarm status handcar1:3vQB7B6MrGQZaxCuFg4oh --json
    """

    def command() -> None:
        from coordinator.monitor.render import render
        from coordinator.status import envelope

        document = read_status(source)
        click.echo(envelope(document) if as_json else "\n".join(render(document)))

    sys.exit(run_command(command, program="swarm status", debug=debug))


@swarm.command()
@click.argument("source", metavar="INVITE|DIR")
@with_json
@with_debug
def peers(source: str, as_json: bool, debug: bool) -> None:
    """List who takes part, what they earned, and with whom their neighbours quarrel.

    Example: swarm peers my-run
    """
    _show("peers", "swarm.peers/1", source, as_json=as_json, debug=debug)


@swarm.command()
@click.argument("source", metavar="INVITE|DIR")
@with_json
@with_debug
def credits(source: str, as_json: bool, debug: bool) -> None:
    """Show what everybody has earned, most first.

    Credits are floating-point operations that the coordinator worked out from receipts that both ends of every hop
    have signed. They are held for a while before they are free. Peers appear under the name that they gave themselves
    with --name; who gave none is a random word.

    Example: swarm credits my-run --json
    """
    _show("credits", "swarm.credits/1", source, as_json=as_json, debug=debug)


def _show(what: str, schema: str, source: str, *, as_json: bool, debug: bool) -> None:
    def command() -> None:
        from coordinator.monitor import standings
        from coordinator.status import envelope

        table = standings.TABLES[what](read_status(source))
        click.echo(envelope(table.data, schema=schema) if as_json else "\n".join(table.lines))

    sys.exit(run_command(command, program=f"swarm {what}", debug=debug))


def main() -> None:
    """Entry point of the `swarm` script."""
    swarm(prog_name="swarm")


def read_status(source: str) -> dict[str, Any]:
    """Return the status document of an invite's run or of a run directory."""
    from protocol.invite import PREFIX, Invite

    # the prefix decides: an invite is longer than a file name may be, and asking the system about it fails
    if not source.strip().startswith(PREFIX):
        path = Path(source)
        if path.is_dir():
            from coordinator.monitor.local import status_of_directory

            return status_of_directory(path)
        if path.exists() or "/" in source:
            raise ConfigError(f"{source} is neither an invite nor a run directory.")
    invite = Invite.from_text(source)
    from protocol.process import run_loop
    from protocol.transport.asking import ask_status  # imports hivemind

    document: dict[str, Any] = run_loop(ask_status(invite))
    return document


if __name__ == "__main__":
    main()
