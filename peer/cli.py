"""The `peer` command. Parses and prints; what happens is in `peer/app.py`.

Heavy libraries (torch, hivemind) are imported inside the commands that need them, so that `peer --help`
answers at once.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.memory.planning.budgets import Limits, check_limits, default_audit_bytes
from peer.settings import IDENTITY_FILE, PeerSettings, default_data_dir, default_name
from protocol.console import print_document, run_command, set_up_logging, with_debug, with_json
from protocol.control import NAME_PATTERN
from protocol.errors import ConfigError, LocalFault
from protocol.ids import PeerId
from protocol.invite import Invite
from protocol.process import run_loop
from protocol.sizes import parse_size

if TYPE_CHECKING:
    from peer.planning import Question

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
MBPS = click.FloatRange(min=0.1)
DATA_DIR = click.option("--data-dir", type=FOLDER, default=None, help="Keys, tokens, state. [default: per user]")
LEVELS = click.Choice(["debug", "info", "warning", "error"])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="handcar")
def peer() -> None:
    """Bring this machine's card to a Handcar run."""


@peer.command()
@click.argument("invite")
@click.option("--name", default=None, help="Shown to others. [default: peer-XXXX]")
@DATA_DIR
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(1, 1024), default=None, help="CPU threads. [default: all but one]")
@click.option("--stage", "stages", type=click.IntRange(min=0), multiple=True, help="Ask for this stage; repeatable.")
@click.option("--device-memory", metavar="SIZE", default=None, help="Such as 6GiB. [default: most of what is free]")
@click.option("--host-memory", metavar="SIZE", default=None, help="For what the device cannot hold. [same default]")
@click.option("--audit-memory", metavar="SIZE", default=None, help="To recompute others' work. [default: up to 1GiB]")
@click.option("--nvme", metavar="DIR", type=FOLDER, default=None, help="For what memory cannot hold. [default: none]")
@click.option("--nvme-limit", metavar="SIZE", default=None, help="Of the files there. [default: free space]")
@click.option("--nvme-writes-per-day", metavar="SIZE", default=None, help="Spares the drive. [default: no cap]")
@click.option("--upload-mbps", metavar="X", type=MBPS, default=None, help="Megabits per second. [default: no cap]")
@click.option("--download-mbps", metavar="X", type=MBPS, default=None, help="The same for what comes in.")
@click.option("--listen", multiple=True, help="Multiaddr to listen on; repeatable. [default: any TCP port]")
@click.option("--announce", multiple=True, help="Multiaddr that others should dial; repeatable.")
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), default=None, help="JSON lines go here.")
@click.option("--log-level", type=LEVELS, default="warning", show_default=True)
@with_debug
def join(
    invite: str,
    name: str | None,
    data_dir: Path | None,
    device: str,
    threads: int | None,
    stages: tuple[int, ...],
    device_memory: str | None,
    host_memory: str | None,
    audit_memory: str | None,
    nvme: Path | None,
    nvme_limit: str | None,
    nvme_writes_per_day: str | None,
    upload_mbps: float | None,
    download_mbps: float | None,
    listen: tuple[str, ...],
    announce: tuple[str, ...],
    log_file: Path | None,
    log_level: str,
    debug: bool,
) -> None:
    """Take part in the run that INVITE names, until Ctrl-C.

    The first Ctrl-C finishes the microbatches at hand and says goodbye; the second one stops at once.

    Example: peer join handcar1:3vQB7B6MrGQZaxCuFg4oh --device cuda --name oak
    """

    def command() -> None:
        limits = _limits(device_memory, host_memory, nvme, nvme_limit, nvme_writes_per_day, audit_memory)
        check_limits(limits)
        settings = _settings(name, data_dir, device, threads, stages, limits, listen, announce)
        settings = replace(
            settings,
            upload_mbps=upload_mbps,
            download_mbps=download_mbps,
            audit_bytes=limits.audit_bytes,
        )
        parsed = Invite.from_text(invite)
        set_up_logging(level=log_level, file=log_file)
        from peer.app import join_run  # imports torch and hivemind

        run_loop(join_run(parsed, settings))

    sys.exit(run_command(command, program="peer join", debug=debug))


@peer.command()
@click.argument("invite")
@click.option("--name", default=None, help="Shown to others. [default: peer-XXXX]")
@DATA_DIR
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(1, 1024), default=None, help="CPU threads. [default: all but one]")
@click.option("--stage", "stages", type=click.IntRange(min=0), multiple=True, help="Follow this one. [default: all]")
@click.option("--device-memory", metavar="SIZE", default=None, help="Such as 6GiB. [default: most of what is free]")
@click.option("--host-memory", metavar="SIZE", default=None, help="For what the device cannot hold. [same default]")
@click.option("--audit-memory", metavar="SIZE", default=None, help="For past weights. [default: up to 1GiB]")
@click.option("--download-mbps", metavar="X", type=MBPS, default=None, help="Megabits per second. [default: no cap]")
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), default=None, help="JSON lines go here.")
@click.option("--log-level", type=LEVELS, default="warning", show_default=True)
@with_debug
def watch(
    invite: str,
    name: str | None,
    data_dir: Path | None,
    device: str,
    threads: int | None,
    stages: tuple[int, ...],
    device_memory: str | None,
    host_memory: str | None,
    audit_memory: str | None,
    download_mbps: float | None,
    log_file: Path | None,
    log_level: str,
    debug: bool,
) -> None:
    """Recompute what others did in the run that INVITE names, for its organiser, until Ctrl-C.

    For stages with fewer than three replicas, which cannot look at each other. It hosts nothing. The coordinator must
    know its key: coordinator run DIR --watcher "$(peer identity create --data-dir DATA)"

    Example: peer watch handcar1:3vQB7B6MrGQZaxCuFg4oh --data-dir ./watcher
    """

    def command() -> None:
        limits = _limits(device_memory, host_memory, None, None, None, audit_memory)
        check_limits(limits)
        settings = replace(
            _settings(name, data_dir, device, threads, stages, limits, (), ()),
            download_mbps=download_mbps,
            audit_bytes=limits.audit_bytes,
        )
        parsed = Invite.from_text(invite)
        set_up_logging(level=log_level, file=log_file)
        from peer.app import watch_run  # imports torch and hivemind

        run_loop(watch_run(parsed, settings))

    sys.exit(run_command(command, program="peer watch", debug=debug))


@peer.command()
@click.argument("model_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--prompt", default="def ", show_default=True)
@click.option("--tokens", type=click.IntRange(1, 4096), default=96, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@with_debug
def sample(model_dir: Path, prompt: str, tokens: int, seed: int, debug: bool) -> None:
    """Let an exported model continue PROMPT.

    Example: peer sample ./export --prompt "import "
    """

    def command() -> None:
        from peer.model.generate import sample as generate  # imports torch and transformers

        click.echo(generate(model_dir, prompt, max_new_tokens=tokens, seed=seed))

    sys.exit(run_command(command, program="peer sample", debug=debug))


@peer.command()
@click.argument("invite")
@click.option("--data-dir", type=FOLDER, default=None, help="As given to peer join.")
@with_json
@with_debug
def receipts(invite: str, data_dir: Path | None, as_json: bool, debug: bool) -> None:
    """Show what this peer was credited with in the run that INVITE names, and what it has not handed in yet.

    Example: peer receipts handcar1:3vQB7B6MrGQZaxCuFg4oh
    """

    def command() -> None:
        from peer.earnings import look  # imports hivemind

        found = run_loop(look(Invite.from_text(invite), data_dir=data_dir or default_data_dir()))
        if as_json:
            print_document("peer.receipts/1", found.to_json())
        else:
            click.echo("\n".join(found.lines()))

    sys.exit(run_command(command, program="peer receipts", debug=debug))


@peer.group(name="identity")
def identity_group() -> None:
    """Who this machine is to others: one key, in the data folder.

    Example: peer identity show
    """


@identity_group.command()
@DATA_DIR
@with_json
@with_debug
def create(data_dir: Path | None, as_json: bool, debug: bool) -> None:
    """Make this machine's key, if it has none yet, and print its peer id. Joining a run does so, too.

    Example: peer identity create
    """

    def command() -> None:
        from peer.identity import make_identity

        folder = data_dir or default_data_dir()
        _print_identity(folder, make_identity(folder).peer_id, as_json=as_json)

    sys.exit(run_command(command, program="peer identity create", debug=debug))


@identity_group.command()
@DATA_DIR
@with_json
@with_debug
def show(data_dir: Path | None, as_json: bool, debug: bool) -> None:
    """Print this machine's peer id.

    Example: peer identity show
    """

    def command() -> None:
        from peer.identity import load_identity

        folder = data_dir or default_data_dir()
        _print_identity(folder, load_identity(folder).peer_id, as_json=as_json)

    sys.exit(run_command(command, program="peer identity show", debug=debug))


@identity_group.command()
@DATA_DIR
@with_json
@with_debug
def rotate(data_dir: Path | None, as_json: bool, debug: bool) -> None:
    """Replace this machine's key by a new one, for example if somebody else may have a copy.

    The old key signs that the new one goes on in its place: runs keep what belongs to you, and let the old key in no
    more once you have joined again. The old key's file is kept aside. No peer may run with this data folder.

    Example: peer identity rotate
    """

    def command() -> None:
        from peer.identity import rotate as rotate_identity

        done = rotate_identity(data_dir or default_data_dir())
        if as_json:
            print_document("peer.rotate/1", {"before": done.before, "peer": done.now, "kept": str(done.kept)})
        else:
            click.echo(done.now)
        click.echo(f"{done.before} hands over to {done.now}. Join your runs again, soon: peer join INVITE", err=True)

    sys.exit(run_command(command, program="peer identity rotate", debug=debug))


@peer.group()
def bench() -> None:
    """See what this machine, or another one, can do.

    Example: peer bench plan
    """


@bench.command(name="plan")
@click.option("--preset", default=None, metavar="NAME", help="A preset's model. [default: demo]")
@click.option("--config", type=FILE, default=None, help="Or a model's config.json.")
@click.option("--stages", type=click.IntRange(1), default=1, metavar="N", help="Into how many stages it is cut.")
@click.option("--stage", type=click.IntRange(0), multiple=True, metavar="K", help="Host this one; repeatable.")
@click.option("--sequences", type=click.IntRange(1), default=4, metavar="N", help="Per microbatch. [default: 4]")
@click.option("--sequence-length", type=click.IntRange(2), default=None, metavar="N", help="[default: up to 1024]")
@click.option("--microbatches", type=click.IntRange(1), default=16, metavar="N", help="Per step. [default: 16]")
@click.option("--optimizer", type=click.Choice(["adamw8bit", "adamw32"]), default="adamw8bit")
@click.option("--master", type=click.Choice(["fp32", "bf16+16", "bf16-sr"]), default="fp32", help="Of weights.")
@click.option("--mode", type=click.Choice(["averaged", "local"]), default="averaged", help="When to step.")
@click.option("--device-memory", metavar="SIZE", default=None, help="Such as 6GiB. [default: most of what is free]")
@click.option("--host-memory", metavar="SIZE", default=None, help="[default: most of what is free]")
@click.option("--nvme", metavar="DIR", type=FOLDER, default=None, help="Folder on an NVMe drive. [default: none]")
@click.option("--nvme-limit", metavar="SIZE", default=None, help="Of the files there. [default: free space]")
@click.option("--nvme-writes-per-day", metavar="SIZE", default=None, help="Spares the drive. [default: no cap]")
@click.option("--audit-memory", metavar="SIZE", default=None, help="As for peer join.")
@click.option("--machine", metavar="NAME", default=None, help="Calculate for another, as 12gb-pcie3x16-good.")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(1, 1024), default=None, metavar="N", help="CPU threads.")
@with_json
@with_debug
def bench_plan(as_json: bool, debug: bool, **options: Any) -> None:
    """Show how a span would train within the memory that is given, and how fast.

    Measures this machine for some seconds. Nothing of the model is allocated.

    Example: peer bench plan --preset 1b --device-memory 6GiB --nvme /data
    """

    def command() -> None:
        from peer.memory.planning.plan_report import describe, to_json
        from peer.planning import answer

        found = answer(_question(**options))
        click.echo(to_json(found) if as_json else describe(found))

    sys.exit(run_command(command, program="peer bench plan", debug=debug))


@bench.command(name="burn-in")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--minutes", type=click.FloatRange(min=0.0, max=24 * 60), default=10.0, show_default=True)
@click.option(
    "--memory",
    metavar="SIZE",
    default=None,
    help="To write and read back. [default: half the card's, 2GiB of a host's]",
)
@with_json
@with_debug
def bench_burn_in(device: str, minutes: float, memory: str | None, as_json: bool, debug: bool) -> None:
    """Keep this machine busy, and see whether it computes what it should.

    For who was told that its results are wrong: with heat, overclocking or bad memory, they are now and then. Ends with
    exit code 5 if something was wrong.

    Example: peer bench burn-in --device cuda --minutes 30
    """

    def command() -> None:
        from peer.engine.build import choose_device
        from peer.engine.burn_in import burn_in
        from peer.ui.burn_in import describe, to_json, told

        found = burn_in(
            choose_device(device),
            seconds=60 * minutes,
            memory_bytes=None if memory is None else parse_size(memory, what="--memory"),
            on_progress=told(),
        )
        if as_json:
            print_document("peer.burn-in/1", to_json(found))
        else:
            click.echo(describe(found))
        if not found.is_sound:
            raise LocalFault(
                f"{found.device} does not compute what it should.",
                hint="Let it cool down, take back overclocking, and try again; else it should not train.",
            )

    sys.exit(run_command(command, program="peer bench burn-in", debug=debug))


def main() -> None:
    """Entry point of the `peer` script."""
    peer(prog_name="peer")


def _print_identity(folder: Path, me: PeerId, *, as_json: bool) -> None:
    from peer.identity import load_handovers

    before = [signed.signer for signed in load_handovers(folder, me)]
    if as_json:
        print_document("peer.identity/1", {"peer": me, "before": before, "file": str(folder / IDENTITY_FILE)})
    else:
        click.echo(me)


def _settings(
    name: str | None,
    data_dir: Path | None,
    device: str,
    threads: int | None,
    stages: tuple[int, ...],
    limits: Limits,
    listen: tuple[str, ...],
    announce: tuple[str, ...],
) -> PeerSettings:
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"'{name[:40]}' cannot be a name.", hint="Use 1 to 32 letters, digits, dots, dashes or underscores."
        )
    defaults = PeerSettings()
    return PeerSettings(
        name=name or default_name(),
        data_dir=data_dir or default_data_dir(),
        device=device,
        threads=threads or defaults.threads,
        stages=stages,
        limits=limits,
        listen=listen or defaults.listen,
        announce=announce,
    )


def _limits(
    device_memory: str | None,
    host_memory: str | None,
    nvme: Path | None,
    nvme_limit: str | None,
    nvme_writes_per_day: str | None,
    audit_memory: str | None,
) -> Limits:
    def size(option: str, text: str | None) -> int | None:
        return None if text is None else parse_size(text, what=option)

    return Limits(
        device_bytes=size("--device-memory", device_memory),
        host_bytes=size("--host-memory", host_memory),
        nvme=nvme,
        nvme_bytes=size("--nvme-limit", nvme_limit),
        nvme_writes_per_day_bytes=size("--nvme-writes-per-day", nvme_writes_per_day),
        audit_bytes=default_audit_bytes() if audit_memory is None else parse_size(audit_memory, what="--audit-memory"),
    )


def _question(
    *,
    stage: tuple[int, ...],
    stages: int,
    device_memory: str | None,
    host_memory: str | None,
    nvme: Path | None,
    nvme_limit: str | None,
    nvme_writes_per_day: str | None,
    audit_memory: str | None,
    mode: str,
    sequence_length: int | None,
    threads: int | None,
    **others: Any,
) -> Question:
    from peer.memory.planning.workload import Mode
    from peer.planning import Question

    return Question(
        num_stages=stages,
        stages=stage,
        mode=Mode(mode),
        sequence_length=sequence_length,
        threads=threads or PeerSettings().threads,
        limits=_limits(device_memory, host_memory, nvme, nvme_limit, nvme_writes_per_day, audit_memory),
        **others,
    )


if __name__ == "__main__":
    main()
