"""coordinator/forecast/advice.py: what is recommended is enough, and changes no more than it must.

Oracle: the forecast of what is recommended, asked for again by itself.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.forecast.advice import ACTIVATION_CODECS, AVERAGING_CODECS, ENOUGH, MIN_LOCAL_STEPS, advise
from coordinator.forecast.forecast import forecast
from coordinator.forecast.report import settings, warnings
from coordinator.forecast.swarm import Peers, Recipe
from coordinator.init import SECTIONS, overridden
from peer.codecs import codec_names
from protocol.errors import WireError
from protocol.manifest import AveragingMode, AveragingSpec
from tests.coordinator.forecast.asks import FAST, mbps, model, recipe, swarm

HOME = Peers(count=4, upload_mbps=20.0, download_mbps=100.0, tflops=10.0)


def test_what_is_enough_is_kept() -> None:
    advice = advise(swarm(replace(FAST, count=4)), model(2), recipe(batch__microbatches_per_round=100))
    assert advice.best is advice.asked
    assert settings(advice.asked.recipe, advice.best) == {}
    assert (advice.upload_mbps, advice.fewer_stages) == (None, None)


@pytest.mark.parametrize(
    ("megabytes_per_s", "changes"),
    [
        (50, {"averaging.codec": "int8"}),
        (25, {"averaging.codec": "int8", "batch.microbatches_per_round": 24}),
        (12.5, {"averaging.codec": "int8", "batch.microbatches_per_round": 48}),
    ],
)
def test_a_coarser_codec_comes_before_a_longer_round(megabytes_per_s: float, changes: dict[str, object]) -> None:
    """Oracle: on paper. At 50 MB/s fp32 takes 2.4 s, and int8 0.6: little beside 6 s of computing."""
    advice = advise(swarm(replace(FAST, count=2, upload_mbps=mbps(megabytes_per_s * 1e6))), model(), recipe())
    assert not advice.asked.is_enough
    assert settings(advice.asked.recipe, advice.best) == changes


def test_a_thin_line_needs_local_steps() -> None:
    """Oracle: on paper. At 1 MB/s fp32 takes 118 s and sparse 0.75 s, for a round of some 20 s of computing."""
    advice = advise(
        swarm(replace(FAST, count=2, upload_mbps=mbps(1e6))), model(), recipe(batch__microbatches_per_round=40)
    )
    assert advice.best.is_enough
    assert advice.best.recipe.averaging.mode is AveragingMode.DILOCO
    assert (advice.best.forecast.local_steps or 0) >= MIN_LOCAL_STEPS
    assert not advice.best.recipe.averaging.overlap


def test_what_is_recommended_is_what_was_forecast() -> None:
    """Oracle: a forecast for the settings that are printed, put into the manifest's own checks."""
    everybody, cut, asked = swarm(replace(HOME, count=8), ping_ms=30.0, boundary_s=None), model(2), recipe()
    advice = advise(everybody, cut, asked)
    found = settings(asked, advice.best)
    again = Recipe(**overridden({name: getattr(asked, name) for name in SECTIONS}, found))
    assert forecast(everybody, cut, again).tokens_per_s == advice.best.forecast.tokens_per_s
    assert not [text for text in warnings(replace(advice.best, recipe=again)) if "given up" in text]


def test_every_option_is_as_good_as_it_says() -> None:
    everybody, cut = swarm(replace(HOME, count=8), ping_ms=30.0), model(2)
    advice = advise(everybody, cut, recipe())
    for option in advice.options:
        assert option.forecast == forecast(everybody, cut, option.recipe)
    ways = [(o.recipe.averaging.overlap, o.recipe.averaging.mode, o.recipe.averaging.codec) for o in advice.options]
    assert ways == [
        (overlap, mode, codec)
        for overlap in (False, True)
        for mode, codecs in AVERAGING_CODECS.items()
        for codec in codecs
    ]


def test_a_line_that_would_be_enough_is_named() -> None:
    """Oracle: forecasts with that line, and with one a twentieth thinner."""
    everybody, cut, asked = (
        swarm(replace(HOME, count=4)),
        model(4),
        recipe(batch__microbatches_per_round=300),
    )
    advice = advise(everybody, cut, asked)
    assert not advice.best.is_enough
    assert advice.upload_mbps is not None
    for share, is_enough in ((1.0, True), (0.95, False)):
        upload_mbps = share * advice.upload_mbps
        kind = replace(HOME, count=4, upload_mbps=upload_mbps, download_mbps=max(100.0, upload_mbps))
        assert (forecast(replace(everybody, peers=(kind,)), cut, advice.best.recipe).computing >= ENOUGH) == is_enough


def test_a_coarser_cut_that_would_be_enough_is_named() -> None:
    """Oracle: the forecast for it."""
    everybody, asked = swarm(replace(HOME, count=4)), recipe(batch__microbatches_per_round=300)
    advice = advise(everybody, model(4), asked)
    assert advice.fewer_stages is not None
    num_stages, option = advice.fewer_stages
    assert num_stages in (1, 2)
    assert forecast(everybody, model(num_stages), option.recipe).computing >= ENOUGH


def test_links_are_not_blamed_for_what_memory_costs() -> None:
    kind = Peers(count=1, tflops=1e6, device_bytes=0, pcie_gb_per_s=1.0)
    advice = advise(swarm(kind), model(), recipe())
    assert (advice.upload_mbps, advice.fewer_stages) == (None, None)
    assert not advice.best.is_enough


def test_local_steps_are_not_offered_where_their_state_does_not_fit() -> None:
    """Oracle: on paper: 16 bytes per parameter fit, 32 do not."""
    num_elements = sum(span.num_elements for span in model().spans(1))
    kind = replace(HOME, count=2, device_bytes=17 * num_elements, host_bytes=0)
    advice = advise(swarm(kind), model(), recipe(optimizer__name="adamw32"))
    assert {(o.recipe.averaging.mode, o.recipe.averaging.overlap) for o in advice.options} == {
        (AveragingMode.GRADIENT, False)
    }


def test_stages_with_one_replica_are_not_told_how_to_average() -> None:
    advice = advise(swarm(replace(HOME, count=2), ping_ms=1.0), model(2), recipe())
    assert len(advice.options) == 1
    assert advice.options[0].recipe.averaging.codec == "fp32"


@pytest.mark.parametrize("mode", AveragingMode)
def test_codecs_that_are_tried_are_those_that_the_manifest_allows(mode: AveragingMode) -> None:
    """Oracle: the manifest's own validation."""
    spec = recipe().averaging.model_dump()
    for field, tried in (("codec", AVERAGING_CODECS[mode]), ("activation_codec", ACTIVATION_CODECS)):
        allowed = set()
        for name in codec_names():
            try:
                AveragingSpec.from_plain({**spec, "mode": mode, field: name})
            except WireError:
                continue
            allowed.add(name)
        assert allowed == set(tried)
