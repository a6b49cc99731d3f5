"""What the parts of a span are told to keep under way. The engine is a real one, the link is played.

Oracle: arithmetic by hand.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from peer.engine.build import build_span
from peer.memory.planning.budgets import Limits
from peer.pipeline.compute import ComputeThread
from peer.reports import ReportQueue
from peer.settings import PeerSettings
from peer.span_parts import SpanParts
from protocol.architecture import preset
from protocol.ids import PeerId, StageId
from protocol.manifest import ModelSpec
from protocol.signing import SigningKey
from tests.protocol.manifests import batch_spec, manifest

NUM_STAGES, WAVE = 2, 16
BY_ITSELF, SLOTS = NUM_STAGES + 1, 8
LIMITS = Limits(device_bytes=1 << 30)  # so much that the whole round has room


@asynccontextmanager
async def first_stage(folder: Path, **settings: Any) -> AsyncIterator[SpanParts]:
    """Build the parts of a first stage that fits its device."""
    run = manifest(
        model=ModelSpec(config_json=json.dumps(preset("tiny")), num_stages=NUM_STAGES, init_seed=1),
        batch=batch_spec(microbatches_per_round=100),
    )
    made = PeerSettings(device="cpu", threads=1, limits=LIMITS, activation_bytes=1 << 20, **settings)
    engine, compute = build_span(run, [StageId(0)], made), ComputeThread()
    key = SigningKey.generate()
    yield SpanParts(
        link=MagicMock(key=key, peer_id=key.peer_id),
        settings=made,
        manifest=run,
        engine=engine,
        compute=compute,
        reports=ReportQueue(),
        session=1,
        folder=folder,
    )
    await compute.stop()
    engine.close()


def announce_wave(parts: SpanParts) -> None:
    parts.learn_waves({StageId(0): {}, StageId(1): {PeerId("other"): WAVE}})


async def test_a_first_stage_that_has_room_fills_the_waves_behind_it(tmp_path: Path) -> None:
    """Two of them, besides what it keeps under way by itself, and takes from others."""
    async with first_stage(tmp_path) as parts:
        feeding, serving = parts._feeder._in_flight, parts._server._slots._num_slots
        assert (feeding(), serving()) == (BY_ITSELF, SLOTS)
        announce_wave(parts)
        assert (feeding(), serving()) == (BY_ITSELF + 2 * WAVE, SLOTS + 2 * WAVE)


async def test_a_volunteers_own_number_stands(tmp_path: Path) -> None:
    async with first_stage(tmp_path, in_flight=5) as parts:
        announce_wave(parts)
        assert parts._feeder._in_flight() == 5


async def test_a_feeder_knows_the_waves_of_the_others(tmp_path: Path) -> None:
    async with first_stage(tmp_path) as parts:
        parts.learn_waves({StageId(0): {PeerId("slow"): WAVE}})
        assert [parts._feeder._wave_of(PeerId(name)) for name in ("slow", "unknown")] == [WAVE, 1]
