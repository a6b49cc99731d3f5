"""The `peer` command. Parses and prints; what happens is in `peer/app.py`.

Heavy libraries (torch, hivemind) are imported inside the commands that need them, so that `peer --help`
answers at once.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from peer.settings import PeerSettings, default_data_dir, default_name
from protocol.console import run_command, set_up_logging
from protocol.control import NAME_PATTERN
from protocol.errors import ConfigError
from protocol.invite import Invite
from protocol.process import run_loop

LEVELS = click.Choice(["debug", "info", "warning", "error"])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="handcar")
def peer() -> None:
    """Bring this machine's card to a Handcar run."""


@peer.command()
@click.argument("invite")
@click.option("--name", default=None, help="Shown to others. [default: peer-XXXX]")
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), default=None, help="Keys, tokens, state.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(1, 1024), default=None, help="CPU threads. [default: all but one]")
@click.option("--stage", "stages", type=click.IntRange(min=0), multiple=True, help="Ask for this stage; repeatable.")
@click.option("--listen", multiple=True, help="Multiaddr to listen on; repeatable. [default: any TCP port]")
@click.option("--announce", multiple=True, help="Multiaddr that others should dial; repeatable.")
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), default=None, help="JSON lines go here.")
@click.option("--log-level", type=LEVELS, default="warning", show_default=True)
@click.option("--debug", is_flag=True, help="Show a traceback if something unexpected happens.")
def join(
    invite: str,
    name: str | None,
    data_dir: Path | None,
    device: str,
    threads: int | None,
    stages: tuple[int, ...],
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
        settings = _settings(name, data_dir, device, threads, stages, listen, announce)
        parsed = Invite.from_text(invite)
        set_up_logging(level=log_level, file=log_file)
        from peer.app import join_run  # imports torch and hivemind

        run_loop(join_run(parsed, settings))

    sys.exit(run_command(command, program="peer join", debug=debug))


@peer.command()
@click.argument("model_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--prompt", default="def ", show_default=True)
@click.option("--tokens", type=click.IntRange(1, 4096), default=96, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--debug", is_flag=True, help="Show a traceback if something unexpected happens.")
def sample(model_dir: Path, prompt: str, tokens: int, seed: int, debug: bool) -> None:
    """Let an exported model continue PROMPT.

    Example: peer sample ./export --prompt "import "
    """

    def command() -> None:
        from peer.model.generate import sample as generate  # imports torch and transformers

        click.echo(generate(model_dir, prompt, max_new_tokens=tokens, seed=seed))

    sys.exit(run_command(command, program="peer sample", debug=debug))


def main() -> None:
    """Entry point of the `peer` script."""
    peer(prog_name="peer")


def _settings(
    name: str | None,
    data_dir: Path | None,
    device: str,
    threads: int | None,
    stages: tuple[int, ...],
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
        listen=listen or defaults.listen,
        announce=announce,
    )


if __name__ == "__main__":
    main()
