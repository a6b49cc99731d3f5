"""The `coordinator` command. Parses and prints; what happens is in the modules that the commands import.

Heavy libraries are imported inside the commands that need them, so that `coordinator --help` answers at once.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from coordinator.bancli import ban, bans, evidence, unban
from coordinator.commandline import DIRECTORY, SETTING, check_text, finish, parse_settings, write_database
from coordinator.forecast.cli import plan
from coordinator.invitecli import invite, invites, uninvite
from protocol.console import Command, print_document, set_up_logging, with_debug, with_json
from protocol.errors import ConfigError
from protocol.ids import RoundId

ACCESS = click.Choice(["open", "invite"])
LEVELS = click.Choice(["debug", "info", "warning", "error"])
FILE = click.Path(path_type=Path, dir_okay=False)
ANY = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="handcar")
def coordinator() -> None:
    """Organise a Handcar run: make it, serve it, take its model home."""


def _logging(command: Command) -> Command:
    with_level = click.option("--log-level", type=LEVELS, default="warning", show_default=True)(command)
    return click.option("--log-file", type=FILE, default=None, help="JSON lines go here.")(with_level)


def _making(command: Command) -> Command:
    """Options of a run that is about to be made."""
    for option in reversed(
        (
            click.option("--corpus", type=ANY, multiple=True, help="File or folder of text; repeatable."),
            click.option("--preset", default=None, help="tiny, demo, bench, 1b. [default: demo]"),
            click.option("--stages", type=click.IntRange(min=1), default=None, help="Cut the model into so many."),
            click.option("--rounds", type=click.IntRange(min=1), default=None, help="Train for so many rounds."),
            click.option("--seed", type=int, default=0, show_default=True),
            click.option("--set", "settings", multiple=True, metavar=SETTING, help="Change a field of the preset."),
        )
    ):
        command = option(command)
    return command


@coordinator.command()
@click.argument("directory", type=DIRECTORY)
@_making
@click.option("--model", type=ANY, default=None, help="Folder with a Hugging Face config.json.")
@click.option("--tokenizer", default=None, help="bytes, train:N, or a folder.")
@click.option("--name", default=None, help="The run's name. [default: the directory's]")
@with_json
@with_debug
def init(
    directory: Path,
    corpus: tuple[Path, ...],
    preset: str | None,
    stages: int | None,
    rounds: int | None,
    seed: int,
    settings: tuple[str, ...],
    model: Path | None,
    tokenizer: str | None,
    name: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Make a run in DIRECTORY: tokenizer, token files, signed manifest, keys.

    Example: coordinator init my-run --corpus ~/texts --stages 4
    """

    def command() -> None:
        from coordinator.init import init_run
        from coordinator.presets import DEFAULT_PRESET

        if not corpus:
            raise ConfigError("there is no text to train on.", hint="Give some with --corpus PATH.")
        manifest = init_run(
            directory,
            corpus=corpus,
            preset=preset or DEFAULT_PRESET,
            model=model,
            tokenizer=tokenizer,
            stages=stages,
            rounds=rounds,
            name=name,
            seed=seed,
            overrides=parse_settings(settings),
            note=lambda line: click.echo(f"note: {line}", err=True),
        )
        data = manifest.data
        click.echo(
            f"run {manifest.run_id} in {directory}: {manifest.model.num_stages} stages, {data.train.num_tokens} "
            f"training tokens, {manifest.batch.num_rounds} rounds. Start it: coordinator run {directory}",
            err=True,
        )
        if as_json:
            print_document("coordinator.init/1", {"run": manifest.run_id, "directory": str(directory.resolve())})

    finish(command, "init", debug)


@coordinator.command()
@click.argument("directory", type=DIRECTORY)
@click.option("--host-maddr", "host_maddrs", multiple=True, help="Multiaddr to listen on; repeatable.")
@click.option("--announce", "announce_maddrs", multiple=True, help="Multiaddr that peers should dial; repeatable.")
@click.option("--http", default=None, metavar="HOST:PORT", help="Serve the status there: text, and /status.json.")
@click.option("--access", type=ACCESS, default=None, help="Whom to let in. [default: as last time, at first open]")
@click.option("--start-peers", type=int, default=None, help="Begin when so many peers are ready. [default: 1]")
@click.option("--stages-per-peer", type=int, default=None, help="Stages that a joiner is given. [default: 1]")
@click.option("--lost-after", "lost_after_s", type=float, default=None, help="Seconds of silence. [default: 10]")
@click.option("--auto-rollback", is_flag=True, default=None, help="Go back by itself when the held-out loss jumps.")
@click.option("--watcher", "watchers", multiple=True, metavar="PEER", help="Your own `peer watch`; repeatable.")
@click.option("--until-finished", is_flag=True, help="Exit when the run is over.")
@_logging
@with_debug
def run(
    directory: Path,
    host_maddrs: tuple[str, ...],
    announce_maddrs: tuple[str, ...],
    http: str | None,
    access: str | None,
    start_peers: int | None,
    stages_per_peer: int | None,
    lost_after_s: float | None,
    auto_rollback: bool | None,
    watchers: tuple[str, ...],
    until_finished: bool,
    log_file: Path | None,
    log_level: str,
    debug: bool,
) -> None:
    """Serve the run in DIRECTORY and print its invite. Ctrl-C stops; run it again to go on.

    Example: coordinator run my-run --host-maddr /ip4/0.0.0.0/tcp/4001
    """

    def command() -> None:
        from coordinator.settings import read_settings

        settings = read_settings(
            host_maddrs=host_maddrs,
            announce_maddrs=announce_maddrs,
            http=http,
            access=access,
            start_peers=start_peers,
            stages_per_peer=stages_per_peer,
            lost_after_s=lost_after_s,
            auto_rollback=auto_rollback,
            watchers=watchers,
        )
        set_up_logging(level=log_level, file=log_file)
        from coordinator.access import kept_access
        from coordinator.app import run_coordinator  # imports hivemind
        from coordinator.store.database import DATABASE_FILE, reading
        from protocol.process import run_loop

        def on_invite(invite: Any) -> None:
            click.echo(invite.to_text())
            with reading(directory / DATABASE_FILE) as db:
                is_open = kept_access(db) == "open"
            share = "Give that line to volunteers: peer join INVITE"
            ask = f"It lets in by invitation. Make one: coordinator invite {directory}"
            click.echo(f"Serving. {share if is_open else ask}. Ctrl-C stops.", err=True)

        run_loop(run_coordinator(directory, settings, on_invite=on_invite, until_finished=until_finished))

    finish(command, "run", debug)


@coordinator.command()
@click.argument("directory", type=DIRECTORY)
@with_json
@with_debug
def checkpoints(directory: Path, as_json: bool, debug: bool) -> None:
    """List the checkpoints in DIRECTORY, newest first, each with its files checked.

    Example: coordinator checkpoints my-run
    """

    def command() -> None:
        from coordinator.checkpointlist import list_checkpoints
        from coordinator.rundir import RunDir

        rows = list_checkpoints(RunDir.open(directory))
        if as_json:
            print_document("coordinator.checkpoints/1", {"checkpoints": rows})
            return
        if not rows:
            click.echo("no checkpoints yet", err=True)
        for row in rows:
            size = "?" if row["bytes"] is None else f"{row['bytes']:,}"
            click.echo(f"round {row['round']:>6}  {size:>16} bytes  {row['problem'] or 'sound'}")

    finish(command, "checkpoints", debug)


@coordinator.command()
@click.argument("directory", type=DIRECTORY)
@click.option("--to", "round_id", type=click.IntRange(min=0), required=True, help="Round of the checkpoint.")
@click.option("--reason", default="", help="Shown in the events.")
@with_json
@with_debug
def rollback(directory: Path, round_id: int, reason: str, as_json: bool, debug: bool) -> None:
    """Take the whole run in DIRECTORY back to an earlier checkpoint, and go on from there.

    What was learnt since is given up. A coordinator that runs does it within a second, another one when it starts;
    peers start over with their next beats. Later checkpoints are set aside, not deleted.

    Example: coordinator rollback my-run --to 400 --reason "poisoned since then"
    """

    def command() -> None:
        from coordinator.rollback import WISH, Wish
        from coordinator.rundir import RunDir
        from coordinator.store.peers import put_setting

        check_text(reason, "--reason")
        checkpoints = RunDir.open(directory).checkpoints
        if round_id not in checkpoints.rounds():
            known = ", ".join(map(str, checkpoints.rounds())) or "none"
            raise ConfigError(f"there is no checkpoint of round {round_id}.", hint=f"There are: {known}")
        checkpoints.open(RoundId(round_id))
        wish = Wish(round=RoundId(round_id), reason=reason)
        write_database(directory, lambda db: put_setting(db, WISH, wish.to_json()))
        if as_json:
            print_document("coordinator.rollback/1", {"round": round_id})
        else:
            click.echo(f"the run goes back to the checkpoint of round {round_id}")

    finish(command, "rollback", debug)


@coordinator.command()
@click.argument("directory", type=DIRECTORY)
@click.option("--to", "target", type=DIRECTORY, required=True, help="New folder for the model.")
@with_json
@with_debug
def export(directory: Path, target: Path, as_json: bool, debug: bool) -> None:
    """Turn the newest checkpoint into a Hugging Face model folder.

    Example: coordinator export my-run --to my-model
    """

    def command() -> None:
        from coordinator.export import export as export_run
        from coordinator.rundir import RunDir

        exported = export_run(RunDir.open(directory), target)
        click.echo(f"{exported.num_parameters:,} parameters of round {exported.round} in {exported.path}", err=True)
        if as_json:
            data = {"path": str(exported.path.resolve()), "round": exported.round}
            print_document("coordinator.export/1", {**data, "num_parameters": exported.num_parameters})

    finish(command, "export", debug)


@coordinator.command()
@_making
@click.option("--peers", type=click.IntRange(1, 256), default=4, show_default=True, help="Peers to start.")
@click.option("--dir", "directory", type=DIRECTORY, default=None, help="Work here. [default: a new temporary folder]")
@click.option(
    "--kill-one-peer-every",
    "kill_every_s",
    type=click.FloatRange(min=1.0),
    default=None,
    metavar="SECONDS",
    help="Kill a random peer with SIGKILL, start another, again and again.",
)
@click.option("--threads-per-peer", type=click.IntRange(1, 1024), default=None, help="[default: cores / peers]")
@click.option("--peer-options", default="", metavar="TEXT", help="Passed on, as '--device-memory 20MB --nvme DIR'.")
@with_json
@with_debug
def demo(
    corpus: tuple[Path, ...],
    preset: str | None,
    stages: int | None,
    rounds: int | None,
    seed: int,
    settings: tuple[str, ...],
    peers: int,
    directory: Path | None,
    kill_every_s: float | None,
    threads_per_peer: int | None,
    peer_options: str,
    as_json: bool,
    debug: bool,
) -> None:
    """Train a small model with a whole swarm on this machine.

    It starts a coordinator and real peers on loopback, trains on the source text of Python's standard library
    (or on --corpus), exports the model and lets it write a little. An interrupted demo goes on if --dir is given.

    Example: coordinator demo --peers 6 --stages 3 --kill-one-peer-every 20
    """

    def command() -> None:
        from coordinator.demo import DemoPlan, run_demo
        from coordinator.demo_report import SCHEMA, show_summary
        from protocol.process import run_loop

        plan = DemoPlan(
            corpus=corpus,
            preset=preset,
            stages=stages,
            rounds=rounds,
            seed=seed,
            overrides=parse_settings(settings),
            num_peers=peers,
            directory=directory,
            kill_every_s=kill_every_s,
            threads_per_peer=threads_per_peer,
            peer_options=_split(peer_options),
        )
        summary = run_loop(run_demo(plan, say=lambda line: click.echo(line, err=True)))
        show_summary(summary, say=lambda line: click.echo(line, err=True))
        if as_json:
            print_document(SCHEMA, summary.data)

    finish(command, "demo", debug)


for command in (plan, invite, uninvite, invites, ban, unban, bans, evidence):
    coordinator.add_command(command)


def main() -> None:
    """Entry point of the `coordinator` script."""
    coordinator(prog_name="coordinator")


def _split(options: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(options))
    except ValueError as error:
        raise ConfigError(f"--peer-options cannot be read: {error}.") from None


if __name__ == "__main__":
    main()
