"""`coordinator ban`, `unban` and `bans`. Parses and prints.

The commands write the run's database, whether or not a coordinator runs; one that does takes it over at its next tick.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from coordinator.commandline import DIRECTORY, check_text, finish, parse_duration, write_database
from coordinator.monitor.standings import flop
from protocol.console import print_document, with_debug, with_json
from protocol.errors import ConfigError
from protocol.ids import PeerId

PEER_ID = "12D3KooW[1-9A-HJ-NP-Za-km-z]{44}"


@click.command()
@click.argument("directory", type=DIRECTORY)
@click.argument("peer")
@click.option("--reason", default="", help="Shown to the peer, and in the events.")
@click.option("--for", "duration", default=None, metavar="TIME", help="Such as 30m, 12h, 7d. [default: for good]")
@click.option("--revoke-credits", is_flag=True, help="Take back what it has earned and is still held.")
@with_json
@with_debug
def ban(
    directory: Path,
    peer: str,
    reason: str,
    duration: str | None,
    revoke_credits: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Keep PEER (its id, or its name) out of the run in DIRECTORY.

    A coordinator that runs takes it over within a second, and every peer hears of it with its next beat.

    Example: coordinator ban my-run oak --for 7d --reason "sends nonsense"
    """

    def command() -> None:
        from coordinator.store.bans import BanRow, add_ban
        from coordinator.store.credits import revoke
        from coordinator.store.successors import predecessors

        since_s = time.time()
        until_s = None if duration is None else since_s + parse_duration(duration, "--for")
        check_text(reason, "--reason")

        def add(db: Any) -> tuple[BanRow, int]:
            row = BanRow(peer=_find(db, peer), since_s=since_s, until_s=until_s, reason=reason)
            add_ban(db, row)
            mine = (row.peer, *predecessors(db, row.peer)) if revoke_credits else ()  # what it earned by older keys too
            return row, sum(revoke(db, key, reason=reason or "banned", at_s=since_s) for key in mine)

        row, mflop = write_database(directory, add)
        text = f"{row.peer} is banned" + (f", {flop(mflop)} taken back" if revoke_credits else "")
        _say(as_json, "coordinator.ban/1", row.peer, text, until_s=until_s, revoked_mflop=mflop)

    finish(command, "ban", debug)


@click.command()
@click.argument("directory", type=DIRECTORY)
@click.argument("peer")
@with_json
@with_debug
def unban(directory: Path, peer: str, as_json: bool, debug: bool) -> None:
    """Let PEER (its id, or its name) into the run in DIRECTORY again, be it banned or frozen.

    Example: coordinator unban my-run oak
    """

    def command() -> None:
        from coordinator.store.bans import remove_ban

        def remove(db: Any) -> PeerId:
            found = _find(db, peer)
            if not remove_ban(db, found):
                raise ConfigError(f"{peer} is not banned.", hint=f"See: coordinator bans {directory}")
            return found

        found = write_database(directory, remove)
        _say(as_json, "coordinator.unban/1", found, f"{found} may come back")

    finish(command, "unban", debug)


@click.command()
@click.argument("directory", type=DIRECTORY)
@with_json
@with_debug
def bans(directory: Path, as_json: bool, debug: bool) -> None:
    """List who is kept out of the run in DIRECTORY, and why.

    Example: coordinator bans my-run
    """

    def command() -> None:
        from dataclasses import asdict

        from coordinator.bans import until
        from coordinator.store.bans import load_bans
        from coordinator.store.database import DATABASE_FILE, reading

        with reading(directory / DATABASE_FILE) as db:
            # a key that was replaced is nobody's any more
            rows = [row for row in load_bans(db, now_s=time.time()) if row.kind != "rotated"]
        if as_json:
            print_document("coordinator.bans/1", {"bans": [asdict(row) for row in rows]})
            return
        if not rows:
            click.echo("nobody is banned", err=True)
        for row in rows:
            click.echo(f"{row.peer}  {row.kind} {until(row)}  {row.reason}")

    finish(command, "bans", debug)


@click.command()
@click.argument("directory", type=DIRECTORY)
@click.argument("peer")
@with_json
@with_debug
def evidence(directory: Path, peer: str, as_json: bool, debug: bool) -> None:
    """Show what speaks against PEER (its id, or its name) in the run in DIRECTORY.

    Evidence is what a peer has signed itself and contradicts. Disputes are hops that its neighbours tell otherwise:
    that says of two that one is wrong, and not which. Audits are what others found who recomputed its work.

    Example: coordinator evidence my-run oak --json
    """

    def command() -> None:
        from coordinator.store.audits import audits_of, count_findings
        from coordinator.store.database import DATABASE_FILE, reading
        from coordinator.store.receipts import count_disputes, evidence_of
        from coordinator.store.successors import predecessors

        with reading(directory / DATABASE_FILE) as db:
            found = _find(db, peer)
            keys, disputed = (found, *predecessors(db, found)), count_disputes(db)
            rows = sorted((row for key in keys for row in evidence_of(db, key)), key=lambda row: row.id)
            hops = sum(disputed.get(key, (0, 0))[0] for key in keys)
            partners = max(disputed.get(key, (0, 0))[1] for key in keys)
            findings, counts = count_findings(db), Counter[str]()
            for key in keys:
                counts.update(findings.get(key, {}))
            found_wrong = [row for key in keys for row in audits_of(db, key) if row.finding not in ("valid", "nothing")]
            audited = sorted(set(found_wrong), key=lambda row: -row.at_s)
        shown = [
            {"kind": row.kind, "subject": row.subject, "detail": row.detail, "at_s": row.at_s, "proof": row.proof.hex()}
            for row in rows
        ]
        if as_json:
            disputes = {"hops": hops, "partners": partners}
            audits = {"findings": counts, "against": [{**asdict(row), "seed": row.seed.hex()} for row in audited]}
            document = {"peer": found, "evidence": shown, "disputes": disputes, "audits": audits}
            print_document("coordinator.evidence/1", document)
            return
        for row in rows:
            click.echo(f"{row.kind}: {row.detail} ({row.subject})")
        for audit in audited:
            who = f"{audit.peer}, by {audit.auditor}, lied: {', '.join(audit.liars) or 'nobody'}"
            apart = f"activations {audit.outputs:.3g} apart, gradients {audit.returned:.3g}"
            click.echo(f"audit {audit.finding}: round {audit.round}, microbatch {audit.number}: {apart} ({who})")
        click.echo(f"{len(rows)} pieces of evidence; {hops} hops disputed with {partners} others", err=True)
        listed = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        click.echo(f"audits: {listed or 'none'}", err=True)

    finish(command, "evidence", debug)


def _find(db: Any, who: str) -> PeerId:
    """Return the peer that is meant: by its id, or by a name that only one has. Raises `ConfigError`.

    Whose key was replaced is meant by its newest one.
    """
    from coordinator.store.peers import load_peers
    from coordinator.store.successors import all_newest

    rows, following = load_peers(db), all_newest(db)
    is_id = re.fullmatch(PEER_ID, who, re.ASCII) is not None  # who has not come yet can be kept out as well
    if is_id or any(row.peer == who for row in rows):
        return following.get(PeerId(who), PeerId(who))
    named = sorted({following.get(row.peer, row.peer) for row in rows if row.name == who})
    if len(named) == 1:
        return named[0]
    if named:
        raise ConfigError(f"{len(named)} peers are called '{who[:40]}'.", hint=f"Give the id: {', '.join(named[:5])}")
    raise ConfigError(f"no peer '{who[:64]}' ever took part.", hint="Give an id or a name, as swarm status shows.")


def _say(as_json: bool, schema: str, peer: PeerId, text: str, **more: Any) -> None:
    if as_json:
        print_document(schema, {"peer": peer, **more})
    else:
        click.echo(text, err=True)
