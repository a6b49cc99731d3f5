"""`coordinator invite`, `uninvite` and `invites`. Parses and prints.

As with bans, the commands write the run's database, whether or not a coordinator runs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from coordinator.commandline import DIRECTORY, check_text, finish, parse_duration, write_database
from protocol.console import print_document, with_debug, with_json
from protocol.errors import ConfigError

MAX_USES = 1_000_000


@click.command()
@click.argument("directory", type=DIRECTORY)
@click.option("--uses", type=click.IntRange(1, MAX_USES), default=None, help="Peers that it lets in. [default: 1]")
@click.option("--expires", default=None, metavar="TIME", help="Such as 12h, 7d. [default: never]")
@click.option("--note", default="", help="For whom it is; shown by `coordinator invites`.")
@with_json
@with_debug
def invite(directory: Path, uses: int | None, expires: str | None, note: str, as_json: bool, debug: bool) -> None:
    """Print an invite to the run in DIRECTORY.

    By invitation (`coordinator run --access invite`), or with an option: a new one, which is printed only now.
    Otherwise: the one that `coordinator run` last served.

    Example: coordinator invite my-run --uses 3 --expires 7d --note "the maths department"
    """

    def command() -> None:
        from coordinator.access import kept_access, make_invite
        from coordinator.listening import kept_invite
        from coordinator.store.database import DATABASE_FILE, reading
        from protocol.invite import Invite

        now_s = time.time()
        expires_s = None if expires is None else now_s + parse_duration(expires, "--expires")
        check_text(note, "--note")
        with reading(directory / DATABASE_FILE) as db:
            text, access = kept_invite(db), kept_access(db)
        if text is None:
            raise ConfigError(f"{directory} was never served.", hint=f"Start it: coordinator run {directory}")
        if access == "open" and uses is None and expires is None and not note:
            _show(as_json, text, {})
            return
        served = Invite.from_text(text)

        def make(db: Any) -> Any:
            return make_invite(db, uses=uses or 1, expires_s=expires_s, note=note, now_s=now_s)

        row, token = write_database(directory, make)
        invite = served.model_copy(update={"token": token})
        _show(as_json, invite.to_text(), {"id": row.id, "uses": row.uses, "expires_s": expires_s, "note": note})
        click.echo(f"invite {row.id}, {_good_for(row.uses, expires_s)}. It cannot be shown again.", err=True)
        if access == "open":
            click.echo("note: this run is open: it lets in anybody, with any invite or none.", err=True)

    finish(command, "invite", debug)


@click.command()
@click.argument("directory", type=DIRECTORY)
@click.argument("invite_id", metavar="ID")
@with_json
@with_debug
def uninvite(directory: Path, invite_id: str, as_json: bool, debug: bool) -> None:
    """Take back the invite ID of the run in DIRECTORY, and ban who came in by it.

    A coordinator that runs takes it over within a second. Who should stay nevertheless is let in again with
    `coordinator unban`.

    Example: coordinator uninvite my-run 3f9a01c2
    """

    def command() -> None:
        from coordinator.access import revoke

        def take_back(db: Any) -> Any:
            banned = revoke(db, invite_id, now_s=time.time())
            if banned is None:
                hint = f"See: coordinator invites {directory}"
                raise ConfigError(f"there is no invite '{invite_id[:20]}', or not any more.", hint=hint)
            return banned

        banned = write_database(directory, take_back)
        if as_json:
            print_document("coordinator.uninvite/1", {"id": invite_id, "banned": list(banned)})
        else:
            click.echo(f"invite {invite_id} is revoked, and {len(banned)} peers are banned", err=True)

    finish(command, "uninvite", debug)


@click.command()
@click.argument("directory", type=DIRECTORY)
@with_json
@with_debug
def invites(directory: Path, as_json: bool, debug: bool) -> None:
    """List the invites to the run in DIRECTORY, and who came in by them.

    Example: coordinator invites my-run
    """

    def command() -> None:
        from dataclasses import asdict

        from coordinator.access import kept_access, state_of
        from coordinator.store.database import DATABASE_FILE, reading
        from coordinator.store.invites import load_invites, load_uses

        with reading(directory / DATABASE_FILE) as db:
            access, rows, uses = kept_access(db), load_invites(db), load_uses(db)
        shown = []
        for row in rows:
            peers = [{"peer": use.peer, "name": use.name, "used_s": use.used_s} for use in uses if use.invite == row.id]
            state = state_of(row, used=len(peers), now_s=time.time())
            left = row.uses - len(peers) if state == "good" else 0
            shown.append({**asdict(row), "state": state, "uses_left": left, "peers": peers})
        if as_json:
            print_document("coordinator.invites/1", {"access": access, "invites": shown})
            return
        if not shown:
            click.echo("no invites yet", err=True)
        for row, one in zip(rows, shown, strict=True):
            who = ", ".join(peer["name"] or peer["peer"] for peer in one["peers"]) or "nobody"
            good = _good_for(one["uses_left"], row.expires_s) if one["state"] == "good" else one["state"]
            click.echo(f"{row.id}  {good}  came in: {who}  {row.note}".rstrip())

    finish(command, "invites", debug)


def _show(as_json: bool, text: str, more: dict[str, Any]) -> None:
    if as_json:
        print_document("coordinator.invite/1", {"invite": text, **more})
    else:
        click.echo(text)


def _good_for(uses: int, expires_s: float | None) -> str:
    peers = "1 more peer" if uses == 1 else f"{uses} more peers"
    return f"good for {peers}" + (
        "" if expires_s is None else time.strftime(" until %Y-%m-%d %H:%M UTC", time.gmtime(expires_s))
    )
