"""Which recipe a swarm needs: other ways of averaging, other codecs and lengths of a round, tried by forecast. Pure.

Owns: what is tried, what counts as enough, and which of those that are enough is chosen. Must not know: how it looks.

Enough is when the busiest stage computes for 90 % of the time: more is not to be had from links and rounds. What was
asked for is kept if it is enough. Else, of all that are enough, the one wins that changes training least: no averages
that come a round late and no local steps instead of gradients if others are enough, the shortest rounds, the codecs
that were asked for, and then exact ones before coarse ones. Where nothing is enough, it is said what would be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from coordinator.forecast.forecast import Forecast, forecast
from coordinator.forecast.swarm import Model, Peers, Recipe, Swarm
from protocol.errors import ConfigError
from protocol.manifest import AveragingMode, BatchSpec

ENOUGH = 0.9
TOLERANCE = 0.95
"""What is so close to the fastest counts as fast as it, if nothing is enough."""

ACTIVATION_CODECS = ("fp32", "fp16", "bf16", "int8", "int4")
AVERAGING_CODECS = {
    AveragingMode.GRADIENT: ("fp32", "fp16", "int8"),
    AveragingMode.DILOCO: ("fp32", "fp16", "int8", "int4", "sparse"),
}
"""What `protocol/manifest.py` allows, the most exact first."""

GROWTHS = {AveragingMode.GRADIENT: (1, 2, 4), AveragingMode.DILOCO: (1, 2, 4, 8, 16, 32, 64, 128)}
"""Times as many microbatches per round. A round of gradients is a batch, which was chosen for how it learns."""
MAX_MICROBATCHES = 65_536  # what the manifest allows
MIN_LOCAL_STEPS = 30
"""Of a replica in a round: averaging costs as much after fewer of them (SparseLoCo, arXiv 2508.15706, takes 30)."""

MAX_SPEEDUP = 1 << 14
"""How much faster links are tried: from 20 Mbit/s to what nobody has at home."""
SPEEDUP_STEP = 1.02


@dataclass(frozen=True, slots=True)
class Option:
    """A recipe and what to expect of it."""

    recipe: Recipe
    forecast: Forecast

    @property
    def is_enough(self) -> bool:
        return self.forecast.computing >= ENOUGH

    @property
    def is_whole(self) -> bool:
        """Whether rounds are long enough for what is averaged in them."""
        steps = self.forecast.local_steps
        return steps is None or steps >= MIN_LOCAL_STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What was tried, and what to use."""

    asked: Option
    options: tuple[Option, ...]
    """The best of each way of averaging, those that change training least first."""
    best: Option
    """`asked`, or one of `options`."""
    upload_mbps: float | None = None
    """If nothing is enough: an uplink of the slowest peers (all others faster by as much, and all downlinks at least as
    fast) with which the best would be.
    """
    fewer_stages: tuple[int, Option] | None = None
    """If nothing is enough: a cut into fewer stages with which something would be."""


def advise(swarm: Swarm, model: Model, recipe: Recipe) -> Advice:
    """Try other recipes. Raises as `forecast` does, if what was asked for cannot be."""
    asked = Option(recipe, forecast(swarm, model, recipe))
    options = tuple(_options(swarm, model, asked))
    best = asked if asked.is_enough else _enough(options, recipe)
    if best is not None:
        return Advice(asked=asked, options=options, best=best)
    best = _about_fastest([asked, *options], recipe)
    return Advice(
        asked=asked,
        options=options,
        best=best,
        upload_mbps=_needed_upload_mbps(swarm, model, best.recipe),
        fewer_stages=_fewer_stages(swarm, model, recipe),
    )


def _enough(options: Iterable[Option], asked: Recipe) -> Option | None:
    enough = [option for option in options if option.is_enough and option.is_whole]
    return min(enough, key=lambda option: _changes(option.recipe, asked)) if enough else None


def _about_fastest(options: Sequence[Option], asked: Recipe) -> Option:
    """Return the option that changes training least, of those that are about as fast as the fastest."""
    least = TOLERANCE * max(option.forecast.tokens_per_s for option in options)
    enough = (option for option in options if option.forecast.tokens_per_s >= least)
    return min(enough, key=lambda option: _changes(option.recipe, asked))


def _changes(recipe: Recipe, asked: Recipe) -> tuple[int, ...]:
    """Order recipes by how much they change training, in the order of the docstring above."""
    old, new = asked.averaging, recipe.averaging
    modes = list(AVERAGING_CODECS)
    return (
        new.overlap and not old.overlap,
        modes.index(new.mode) > modes.index(old.mode),
        recipe.batch.microbatches_per_round,
        (new.overlap, new.mode) != (old.overlap, old.mode),
        (new.codec, new.stage_codecs) != (old.codec, old.stage_codecs),
        AVERAGING_CODECS[new.mode].index(new.codec) if new.codec != "auto" else 0,
        new.activation_codec != old.activation_codec,
        ACTIVATION_CODECS.index(new.activation_codec),
    )


def _options(swarm: Swarm, model: Model, asked: Option) -> Iterator[Option]:
    """Yield the best option for each way of averaging whose state fits; none but the one asked for if all are alike."""
    is_averaged = asked.forecast.averaging_bytes_per_token > 0
    for way in _ways(asked.recipe) if is_averaged else (asked.recipe,):
        try:
            yield _best_of(swarm, model, way)
        except ConfigError:  # local steps keep more state than gradients: for them there may be no room
            continue


def _ways(recipe: Recipe) -> Iterator[Recipe]:
    for overlap in (False, True):
        for mode, codecs in AVERAGING_CODECS.items():
            for codec in codecs:
                fragments = recipe.averaging.fragments if mode is AveragingMode.DILOCO else 1
                changed = {"mode": mode, "codec": codec, "stage_codecs": (), "overlap": overlap, "fragments": fragments}
                spec = recipe.averaging.model_copy(update=changed)
                yield replace(recipe, averaging=spec)


def _best_of(swarm: Swarm, model: Model, way: Recipe) -> Option:
    """Return the shortest round that is enough, with activations as asked for or else as exact as can be.

    If none is, return what changes least of all that are about as fast as the fastest.
    """
    tried: list[Option] = []
    usual = way.averaging.activation_codec
    others = [codec for codec in ACTIVATION_CODECS if codec != usual and model.num_stages > swarm.stages_per_peer]
    for batch in _batches(way):
        for codec in (usual, *others):
            spec = way.averaging.model_copy(update={"activation_codec": codec})
            candidate = replace(way, averaging=spec, batch=batch)
            option = Option(candidate, forecast(swarm, model, candidate))
            if option.is_enough and option.is_whole:
                return option
            tried.append(option)
    whole = [option for option in tried if option.is_whole]
    return _about_fastest(whole or tried, way)


def _batches(way: Recipe) -> Iterator[BatchSpec]:
    """Yield longer and longer rounds."""
    for growth in GROWTHS[way.averaging.mode]:
        num_microbatches = growth * way.batch.microbatches_per_round
        if growth == 1 or num_microbatches <= MAX_MICROBATCHES:
            yield way.batch.model_copy(update={"microbatches_per_round": num_microbatches})


def _needed_upload_mbps(swarm: Swarm, model: Model, recipe: Recipe) -> float | None:
    """Return the uplink of the slowest peers with which a recipe is enough, all links faster by the same factor."""

    def is_enough(factor: float) -> bool:
        faster = replace(swarm, peers=tuple(_faster(peers, factor) for peers in swarm.peers))
        return forecast(faster, model, recipe).computing >= ENOUGH

    if not is_enough(MAX_SPEEDUP):
        return None
    low, high = 1.0, float(MAX_SPEEDUP)
    while high / low > SPEEDUP_STEP:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high * min(peers.upload_mbps for peers in swarm.peers)


def _faster(peers: Peers, factor: float) -> Peers:
    upload_mbps = factor * peers.upload_mbps
    return replace(peers, upload_mbps=upload_mbps, download_mbps=max(peers.download_mbps, upload_mbps))


def _fewer_stages(swarm: Swarm, model: Model, recipe: Recipe) -> tuple[int, Option] | None:
    """Return half as many stages, or a quarter and so on, if something is enough then: more layers a peer, fewer hops.

    What was measured of a stage, or set for it, says nothing about other cuts.
    """
    num_stages = model.num_stages // 2
    is_about_stages = bool(recipe.averaging.stage_codecs) or any(peers.stage_seconds for peers in swarm.peers)
    while num_stages and not is_about_stages:
        cut, all_fits = Model(model.config, num_stages), replace(swarm, stages_per_peer=1)
        try:
            asked = Option(recipe, forecast(all_fits, cut, recipe))
        except ConfigError:
            return None  # a larger stage does not fit, and the next one would be larger still
        found = asked if asked.is_enough else _enough(_options(all_fits, cut, asked), recipe)
        if found is not None:
            return num_stages, found
        num_stages //= 2
    return None
