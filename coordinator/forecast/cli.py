"""`coordinator plan`. Parses and prints; `question.py` reads what was asked, `advice.py` answers it."""

from __future__ import annotations

from pathlib import Path

import click

from coordinator.commandline import SETTING, finish, parse_settings
from protocol.console import Command, print_document, with_debug, with_json

DIRECTORY = click.Path(path_type=Path, file_okay=False)
ANY = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
RATE = click.FloatRange(min=0, min_open=True)


def _model(command: Command) -> Command:
    """Options that say what is trained, and how."""
    for option in reversed(
        (
            click.option("--preset", default=None, help="tiny, demo, bench, 1b; instead of a run."),
            click.option("--model", type=ANY, default=None, help="Folder with a Hugging Face config.json."),
            click.option("--stages", type=COUNT, default=None, help="Cut the model into so many."),
            click.option("--set", "settings", multiple=True, metavar=SETTING, help="Change a setting."),
            click.option("--target-tokens", type=RATE, metavar="N", help="As in 10e9. [default: all rounds]"),
        )
    ):
        command = option(command)
    return command


def _peers(command: Command) -> Command:
    """Options that say who takes part."""
    for option in reversed(
        (
            click.option("--peers", type=COUNT, default=None, help="So many. [default: one per stage]"),
            click.option("--replicas", type=COUNT, default=None, help="So many of each stage, instead."),
            click.option("--peer", "kinds", multiple=True, metavar="KIND", help="More of a kind; repeatable."),
            click.option("--upload-mbps", type=RATE, metavar="X", help="Of a peer's link. [default: 20]"),
            click.option("--download-mbps", type=RATE, metavar="X", help="[default: 100]"),
            click.option("--latency-ms", type=click.FloatRange(min=0), metavar="X", help="Ping. [default: 30]"),
            click.option("--tflops", type=RATE, metavar="X", help="Sustained, in fp32. [default: 10]"),
            click.option("--stage-seconds", metavar="S[/S...]", help="Measured, instead: of a microbatch."),
            click.option("--round-seconds", type=click.FloatRange(min=0), metavar="S", help="Between two rounds."),
            click.option("--device-memory", metavar="SIZE", help="For state, as in 8GB. [default: enough]"),
            click.option("--host-memory", metavar="SIZE", help="For the rest of it. [default: enough]"),
            click.option("--pcie", type=RATE, metavar="GB/S", help="From host to device. [default: 11]"),
            click.option("--drive", type=RATE, metavar="GB/S", help="Of an NVMe drive. [default: none]"),
            click.option("--wave", type=COUNT, help="Microbatches per load of a layer. [default: 8]"),
            click.option("--stages-per-peer", type=COUNT, default=1, help="[default: 1]"),
            click.option("--in-flight", type=COUNT, help="Per peer of stage 0. [default: stages + 1]"),
            click.option("--keep-activations", is_flag=True, help="Cards have room: nothing is recomputed."),
        )
    ):
        command = option(command)
    return command


@click.command()
@click.argument("directory", type=DIRECTORY, required=False)
@_model
@_peers
@with_json
@with_debug
def plan(
    directory: Path | None,
    preset: str | None,
    model: Path | None,
    stages: int | None,
    settings: tuple[str, ...],
    target_tokens: float | None,
    peers: int | None,
    replicas: int | None,
    kinds: tuple[str, ...],
    upload_mbps: float | None,
    download_mbps: float | None,
    latency_ms: float | None,
    tflops: float | None,
    stage_seconds: str | None,
    round_seconds: float | None,
    device_memory: str | None,
    host_memory: str | None,
    pcie: float | None,
    drive: float | None,
    wave: int | None,
    stages_per_peer: int,
    in_flight: int | None,
    keep_activations: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Forecast the speed of a swarm, and say what it needs. KIND is as in the example.

    Example: coordinator plan --preset 1b --peer 8x20/100mbps,10tflops,device=8GB --peer 4x40/200mbps
    """

    def command() -> None:
        from coordinator.forecast.advice import advise
        from coordinator.forecast.question import Question, read_question
        from coordinator.forecast.report import SCHEMA, as_json_data, describe

        asked = read_question(
            Question(
                directory=directory,
                preset=preset,
                model=model,
                num_stages=stages,
                settings=parse_settings(settings),
                kinds=kinds,
                num_peers=peers,
                replicas=replicas,
                usual={
                    "upload_mbps": upload_mbps,
                    "download_mbps": download_mbps,
                    "tflops": tflops,
                    "stage_seconds": stage_seconds,
                    "device_bytes": device_memory,
                    "host_bytes": host_memory,
                    "pcie_gb_per_s": pcie,
                    "drive_gb_per_s": drive,
                },
                ping_ms=latency_ms,
                boundary_s=round_seconds,
                wave=wave,
                stages_per_peer=stages_per_peer,
                in_flight=in_flight,
                recomputes=not keep_activations,
                target_tokens=target_tokens,
            )
        )
        advice = advise(asked.swarm, asked.model, asked.recipe)
        if as_json:
            print_document(SCHEMA, as_json_data(asked, advice))
        else:
            click.echo("\n".join(describe(asked, advice)))

    finish(command, "plan", debug)
