"""A forecast and the advice that goes with it, for people and as JSON. Pure.

Owns: the lines of `coordinator plan` and the shape of `coordinator.plan/1`. Must not know: how anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from coordinator.forecast.advice import ENOUGH, Advice, Option
from coordinator.forecast.crew import Limit
from coordinator.forecast.forecast import DAY_S, Forecast, PeersForecast
from coordinator.forecast.memory import Residence
from coordinator.forecast.question import Asked
from coordinator.forecast.swarm import Recipe
from protocol.sizes import size_text

SCHEMA = "coordinator.plan/1"
GIGA = 1e9
ROOM = 2.0
"""A deadline that would be missed is set to this many times what is expected."""

_LIMITS = {
    Limit.COMPUTE: "the cards",
    Limit.MEMORY: "state that has to come from host memory or a drive",
    Limit.UPLOAD: "uplinks",
    Limit.DOWNLOAD: "downlinks",
    Limit.PIPELINE: "the way of a microbatch through all stages, with too few under way",
    Limit.BOUNDARY: "what is done between two rounds",
}


def describe(asked: Asked, advice: Advice) -> Iterator[str]:
    """Yield the lines for people."""
    yield from _question(asked)
    yield ""
    yield from _answer(asked, advice.asked)
    yield ""
    yield from _table(asked, advice)
    yield ""
    yield from _use(asked, advice)


def as_json_data(asked: Asked, advice: Advice) -> dict[str, Any]:
    """Return the data of `coordinator.plan/1`."""
    spans = asked.model.spans(1)
    return {
        "model": {
            "name": asked.name,
            "num_parameters": asked.model.num_parameters,
            "stages": [span.num_parameters for span in spans],
        },
        "swarm": asdict(asked.swarm),
        "target_tokens": asked.target_tokens,
        "asked": _option(asked, advice.asked),
        "options": [_option(asked, option) for option in advice.options],
        "use": _option(asked, advice.best) | {"settings": settings(asked.recipe, advice.best)},
        "needed_upload_mbps": advice.upload_mbps,
        "fewer_stages": None
        if advice.fewer_stages is None
        else {
            "stages": advice.fewer_stages[0],
            **_option(asked, advice.fewer_stages[1]),
            "settings": settings(asked.recipe, advice.fewer_stages[1]),
        },
        "enough": ENOUGH,
        "warnings": list(warnings(advice.asked)),
    }


def settings(recipe: Recipe, option: Option) -> dict[str, Any]:
    """Return what has to be set to turn a recipe into another one, by the names of `--set`."""
    old, new = recipe.averaging, option.recipe.averaging
    found: dict[str, Any] = {}
    for name in ("mode", "codec", "overlap", "activation_codec"):
        if getattr(old, name) != getattr(new, name):
            found[f"averaging.{name}"] = getattr(new, name)
    if new.codec == "sparse" != old.codec:
        found |= {"averaging.outer_learning_rate": 1.0, "averaging.outer_momentum": 0.0}  # docs/organiser.md
    if recipe.batch.microbatches_per_round != option.recipe.batch.microbatches_per_round:
        found["batch.microbatches_per_round"] = option.recipe.batch.microbatches_per_round
    return found | _deadlines(option)


def warnings(option: Option) -> Iterator[str]:
    """Say what of a recipe would not work out."""
    for name, value in _deadlines(option).items():
        taken_s, limit_s = _timed(option)[name]
        what = "a round" if name == "timing.round_deadline_s" else "averaging"
        yield f"{what} takes {duration(taken_s)} and is given up after {duration(limit_s)}: --set {name}={value:g}"
    if not option.is_whole:
        steps = option.forecast.local_steps or 0.0
        yield f"a replica takes {steps:.3g} steps of its own in a round: 30 or more are usual"


def _timed(option: Option) -> dict[str, tuple[float, float]]:
    timing, found = option.recipe.timing, option.forecast
    return {
        "timing.round_deadline_s": (found.pipeline_s, timing.round_deadline_s),
        "timing.reduce_timeout_s": (found.averaging_s, timing.reduce_timeout_s),
    }


def _deadlines(option: Option) -> dict[str, float]:
    return {
        name: float(math.ceil(ROOM * taken_s))
        for name, (taken_s, limit_s) in _timed(option).items()
        if taken_s > limit_s
    }


# -- lines --------------------------------------------------------------------------------------------


def _question(asked: Asked) -> Iterator[str]:
    sizes = [span.num_parameters / 1e6 for span in asked.model.spans(1)]
    stages = f"{len(sizes)} stages of {min(sizes):,.1f} to {max(sizes):,.1f} M" if len(sizes) > 1 else "1 stage"
    yield _line("model", f"{asked.name}: {asked.model.num_parameters / 1e6:,.1f} M parameters, {stages}")
    swarm = asked.swarm
    hosted = "" if swarm.stages_per_peer == 1 else f", {swarm.stages_per_peer} stages each"
    yield _line("swarm", f"{_count(swarm.num_peers, 'peer')}{hosted}, {swarm.ping_ms:g} ms there and back")
    yield _line("recipe", f"{_way(asked.recipe)}; {_activations(asked.recipe)}; rounds of {_length(asked.recipe)}")


def _answer(asked: Asked, option: Option) -> Iterator[str]:
    found = option.forecast
    yield _line(
        "speed", f"{found.tokens_per_s:,.0f} tokens/s; the busiest stage computes {found.computing:.0%} of the time"
    )
    yield _line("limit", _LIMITS[found.limit])
    yield _line("round", _round(found))
    yield _line("sent", _sent(found))
    yield _line("time", f"{_days(found.days(asked.target_tokens))} for {_tokens(asked.target_tokens)} tokens")
    yield ""
    yield _columns("peers", ("computing", "sending", "receiving", "sent/day", "device", "elsewhere"), width=34)
    for each in found.peers:
        yield _columns(_kind(each), _cells(each, found), width=34)
    for warning in warnings(option):
        yield _line("warning", warning)


def _round(found: Forecast) -> str:
    hidden = " hidden" if found.is_averaging_hidden else ""
    parts = (
        (found.pipeline_s, "pipeline"),
        (found.averaging_s, f"averaging{hidden}"),
        (found.boundary_s, "boundary"),
        (found.evaluation_s, "evaluation"),
    )
    return f"{duration(found.round_s)}: " + ", ".join(f"{duration(seconds)} {name}" for seconds, name in parts)


def _sent(found: Forecast) -> str:
    return (
        f"{found.bytes_per_token:,.0f} bytes per token: {found.activation_bytes_per_token:,.0f} of activations, "
        f"{found.averaging_bytes_per_token:,.0f} of averaging, {found.checkpoint_bytes_per_token:,.0f} of checkpoints"
    )


def _kind(each: PeersForecast) -> str:
    peers = each.peers
    card = "measured" if peers.stage_seconds else f"{peers.tflops:g} TFLOP/s"
    return f"{peers.count} x {peers.upload_mbps:g}/{peers.download_mbps:g} Mbit/s, {card}"


def _cells(each: PeersForecast, found: Forecast) -> tuple[str, ...]:
    home: Residence = each.residence
    per_day = each.traffic.up / found.round_s * DAY_S
    elsewhere = home.host_bytes + home.drive_bytes
    return (
        f"{each.computing:.0%}",
        f"{each.sending:.0%}",
        f"{each.receiving:.0%}",
        f"{per_day / GIGA:,.1f} GB",
        size_text(home.device_bytes),
        size_text(elsewhere) if elsewhere else "-",
    )


def _table(asked: Asked, advice: Advice) -> Iterator[str]:
    yield _columns("averaging", ("activations", "round", "tokens/s", "computing", "time"), width=24)
    for option in advice.options:
        found = option.forecast
        cells = (
            option.recipe.averaging.activation_codec,
            _length(option.recipe),
            f"{found.tokens_per_s:,.0f}",
            f"{found.computing:.0%}",
            _days(found.days(asked.target_tokens)),
        )
        yield _columns(_way(option.recipe), cells, width=24) + ("  <-" if option is advice.best else "")


def _use(asked: Asked, advice: Advice) -> Iterator[str]:
    best, limit = advice.best, _LIMITS[advice.best.forecast.limit]
    if best.is_enough:
        yield _line("use", _set(asked, best))
        return
    yield _line("use", f"{_set(asked, best)}: the best there is, {best.forecast.computing:.0%}. It waits for {limit}")
    if advice.upload_mbps is not None:
        yield _line("or", f"{ENOUGH:.0%} if the slowest links had {advice.upload_mbps:,.0f} Mbit/s up and down")
    if advice.fewer_stages is not None:
        num_stages, option = advice.fewer_stages
        most = max(each.residence.total_bytes for each in option.forecast.peers)
        yield _line(
            "or", f"{ENOUGH:.0%} with --stages {num_stages} ({size_text(most)} of state) and {_set(asked, option)}"
        )


def _set(asked: Asked, option: Option) -> str:
    found = settings(asked.recipe, option)
    return " ".join(f"--set {key}={_value(value)}" for key, value in found.items()) or "the settings as they are"


# -- JSON ---------------------------------------------------------------------------------------------


def _option(asked: Asked, option: Option) -> dict[str, Any]:
    recipe, found = option.recipe, option.forecast
    return {
        "mode": recipe.averaging.mode.value,
        "codec": recipe.averaging.codec,
        "stage_codecs": list(recipe.averaging.stage_codecs),
        "fragments": recipe.averaging.fragments,
        "overlap": recipe.averaging.overlap,
        "activation_codec": recipe.averaging.activation_codec,
        "microbatches_per_round": recipe.batch.microbatches_per_round,
        "is_enough": option.is_enough,
        "tokens_per_s": found.tokens_per_s,
        "days": found.days(asked.target_tokens),
        "bytes_per_token": found.bytes_per_token,
        **{key: value for key, value in asdict(found).items() if key != "peers"},
        "peers": [
            {
                "count": each.peers.count,
                "computing": each.computing,
                "sending": each.sending,
                "receiving": each.receiving,
                "sent_bytes_per_round": each.traffic.up,
                "received_bytes_per_round": each.traffic.down,
                "device_bytes": each.residence.device_bytes,
                "host_bytes": each.residence.host_bytes,
                "drive_bytes": each.residence.drive_bytes,
            }
            for each in found.peers
        ],
    }


# -- words --------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:,.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else duration(days * DAY_S)


def _tokens(tokens: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= size:
            return f"{tokens / size:,.3g} {letter}"
    return f"{tokens:,.0f}"


def _way(recipe: Recipe) -> str:
    spec = recipe.averaging
    turns = f" in {spec.fragments} fragments" if spec.fragments > 1 else ""
    codec = "/".join(spec.stage_codecs) or spec.codec
    return f"{spec.mode.value} {codec}{turns}{' overlap' * spec.overlap}"


def _activations(recipe: Recipe) -> str:
    return f"{recipe.averaging.activation_codec} activations"


def _length(recipe: Recipe) -> str:
    return f"{recipe.batch.microbatches_per_round:,} x {recipe.batch.tokens_per_microbatch:,}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(label: str, text: str) -> str:
    return f"{label:<10} {text}"


def _columns(label: str, cells: tuple[str, ...], *, width: int) -> str:
    return f"{label:<{width}}" + "".join(f" {cell:>13}" for cell in cells)
