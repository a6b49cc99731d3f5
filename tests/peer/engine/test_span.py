"""What a span keeps and drops when a microbatch goes wrong. Oracles: the engines' own statistics and sums."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from peer.codecs import codec
from peer.engine import stage_engine
from peer.engine.optimizer import OptimizerSpec
from peer.engine.span import SpanEngine
from peer.engine.stage_engine import StageEngine
from peer.memory.disk.wear import WriteBudgetSpent
from peer.tasks import RoundOver
from protocol.architecture import preset
from protocol.errors import LocalFault, PeerFault, SwarmError, WireError
from protocol.ids import RoundId, StageId
from tests.peer.engine.poke import gradient, gradients

TINY = preset("tiny")
WIDTH = int(TINY["hidden_size"])
MICROBATCH = (2, 8)
SHAPE = (*MICROBATCH, WIDTH)
ROUND = RoundId(3)
FP32 = codec("fp32")


def span(*stages: int, num_stages: int = 4) -> SpanEngine:
    engines = {
        StageId(stage): StageEngine.build(
            TINY, num_stages=num_stages, stage=stage, optimizer=OptimizerSpec(name="adamw32"), seed=5
        )
        for stage in stages
    }
    made = SpanEngine(engines, codec=FP32, hidden_size=WIDTH, num_stages=num_stages, microbatch=MICROBATCH)
    for stage in stages:
        made.open(StageId(stage), ROUND)
    return made


def body(value: float | None = None) -> bytes:
    if value is not None:
        return FP32.encode(torch.full((MICROBATCH[0] * MICROBATCH[1] * WIDTH,), value))
    return FP32.encode(torch.randn(MICROBATCH[0] * MICROBATCH[1] * WIDTH, generator=torch.Generator().manual_seed(1)))


def not_finite() -> bytes:
    return torch.full((MICROBATCH[0] * MICROBATCH[1] * WIDTH,), torch.nan).numpy().tobytes()


def held(engine: SpanEngine) -> int:
    """Count the forward passes that wait for their backward."""
    return sum(one.statistics().pending for one in engine.engines.values())


def feed(engine: SpanEngine, back: bytes) -> bytes | None:
    """One microbatch forth and back, as the runner does it: what fails is discarded."""
    _, shape, ticket = engine.forward(body(), SHAPE, entry=engine.first, round_id=ROUND)
    try:
        return engine.backward(ticket, back, shape, target_tokens=16)
    except SwarmError:
        engine.discard(ticket)
        raise


def test_a_gradient_that_is_none_adds_nothing_and_leaves_nothing() -> None:
    engine = span(1, 2)
    feed(engine, body())
    before = [shard for one in engine.engines.values() for shard in gradients(one)]
    with pytest.raises(WireError):
        feed(engine, not_finite())
    after = [shard for one in engine.engines.values() for shard in gradients(one)]
    assert any(one.any() for one in before)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert held(engine) == 0
    assert [engine.freeze(stage) for stage in engine.engines] == [16, 16]


@pytest.mark.parametrize("value", [1e9, -1e9, 3e38])
def test_numbers_that_no_model_makes_are_the_fault_of_who_sent_them(value: float) -> None:
    """They are finite, and would overflow here: eight of them, and this machine would take itself for broken."""
    engine = span(1, 2)
    feed(engine, body())
    with pytest.raises(PeerFault):
        feed(engine, body(value))
    with pytest.raises(PeerFault):
        engine.forward(body(value), SHAPE, entry=StageId(1), round_id=ROUND)
    assert held(engine) == 0
    assert [engine.freeze(stage) for stage in engine.engines] == [16, 16]


def test_a_gradient_that_overflows_costs_the_sum_and_not_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every later reduce of this replica would fail, and with it, where it is the only one, the run."""
    monkeypatch.setattr(stage_engine, "MAX_MAGNITUDE", math.inf)  # which keeps what others send from overflowing here
    engine = span(1, 2)
    feed(engine, body())
    with pytest.raises(LocalFault):
        feed(engine, body(3e38))
    assert held(engine) == 0
    feed(engine, body())
    tokens = [engine.freeze(stage) for stage in engine.engines]
    for one, counted in zip(engine.engines.values(), tokens, strict=True):
        assert one.has_finite_gradients()
        assert counted in (16, 32), "what was dropped must not be counted"
        assert all(FP32.encode(shard) for shard in one.gradient_shards())
    assert 16 in tokens, "nothing overflowed: the test is too tame"


def test_an_overflow_that_nobody_noticed_is_found_at_the_end_of_the_round() -> None:
    engine = span(1)
    feed(engine, body())
    gradient(engine.engines[StageId(1)])[0] = torch.inf
    assert engine.freeze(StageId(1)) == 0
    assert engine.engines[StageId(1)].gradient_norm() == 0.0


def test_a_forward_pass_that_fails_half_way_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = span(1, 2)

    def broken(wave: object) -> None:
        raise LocalFault("the hidden states that this machine computed are not finite.")

    monkeypatch.setattr(engine.engines[StageId(2)], "forward_wave", broken)
    with pytest.raises(LocalFault):
        engine.forward(body(), SHAPE, entry=engine.first, round_id=ROUND)
    assert held(engine) == 0


def test_the_last_span_forgets_a_microbatch_whose_loss_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = span(2, 3)

    def broken(wave: object) -> None:
        raise LocalFault("the loss that this machine computed is not finite.")

    monkeypatch.setattr(engine.engines[StageId(3)], "loss_wave", broken)
    labels = torch.zeros(MICROBATCH, dtype=torch.int64).numpy()
    with pytest.raises(LocalFault):
        engine.loss_and_backward(body(), SHAPE, labels, entry=engine.first, round_id=ROUND)
    assert held(engine) == 0


@pytest.mark.parametrize(
    "late", [lambda engine: engine.freeze(StageId(2)), lambda engine: engine.open(StageId(2), RoundId(4))]
)
def test_what_comes_after_the_round_is_added_nowhere(late: Callable[[SpanEngine], object]) -> None:
    engine = span(1, 2)
    _, shape, ticket = engine.forward(body(), SHAPE, entry=engine.first, round_id=ROUND)
    late(engine)
    with pytest.raises(RoundOver):
        engine.backward(ticket, body(), shape, target_tokens=16)
    assert all(one.gradient_norm() == 0.0 for one in engine.engines.values())


@pytest.mark.parametrize(
    "shape", [(3, 8, WIDTH), (2, 9, WIDTH), (2, 7, WIDTH), (2, 8, WIDTH + 1), (16, WIDTH), (1 << 20, 8, WIDTH)]
)
def test_a_body_that_is_no_microbatch_has_no_size(shape: tuple[int, ...]) -> None:
    """It is refused before a byte of it is read: its size would be whatever a stranger likes."""
    with pytest.raises(WireError, match="cannot enter"):
        span(1).body_bytes(shape)


def test_a_smaller_microbatch_is_one_too() -> None:
    """The last one of an evaluation may be."""
    assert span(1).body_bytes((1, 8, WIDTH)) == 8 * WIDTH * 4


def test_a_task_may_enter_in_the_middle_of_a_span() -> None:
    """Spans of two peers may overlap. Oracle: a span of the later stage alone, bit for bit."""
    wide, narrow = span(1, 2), span(2)
    results = []
    for engine in (wide, narrow):
        hidden, shape, ticket = engine.forward(body(), SHAPE, entry=StageId(2), round_id=ROUND)
        back = engine.backward(ticket, body(), shape, target_tokens=16)
        results.append((hidden, back, engine.forward_only(body(), SHAPE, entry=StageId(2))))
    assert results[0] == results[1]
    assert wide.engines[StageId(1)].gradient_norm() == 0.0
    assert wide.engines[StageId(2)].gradient_norm() == narrow.engines[StageId(2)].gradient_norm() > 0
    assert [wide.freeze(stage) for stage in (StageId(1), StageId(2))] == [0, 16]


def test_a_task_may_enter_a_last_span_in_its_middle() -> None:
    """Oracle: a span of the last stage alone."""
    labels = torch.ones(MICROBATCH, dtype=torch.int64).numpy()
    wide, narrow = span(2, 3), span(3)
    losses = [
        engine.loss_and_backward(body(), SHAPE, labels, entry=StageId(3), round_id=ROUND) for engine in (wide, narrow)
    ]
    assert losses[0] == losses[1]
    evaluated = [engine.evaluate(body(), SHAPE, labels, entry=StageId(3)) for engine in (wide, narrow)]
    assert evaluated[0] == evaluated[1]
    assert [wide.freeze(stage) for stage in (StageId(2), StageId(3))] == [0, 16]


def test_a_stage_that_is_frozen_does_not_stop_tasks_that_enter_behind_it() -> None:
    engine = span(1, 2)
    engine.freeze(StageId(1))
    engine.forward(body(), SHAPE, entry=StageId(2), round_id=ROUND)
    with pytest.raises(RoundOver):
        engine.forward(body(), SHAPE, entry=StageId(1), round_id=ROUND)


def test_what_entered_behind_a_stage_that_is_frozen_still_goes_backward() -> None:
    """As when one stage of a span is fetched anew. Oracle: the later stage's tokens."""
    engine = span(1, 2)
    _, shape, ticket = engine.forward(body(), SHAPE, entry=StageId(2), round_id=ROUND)
    assert engine.freeze(StageId(1)) == 0
    engine.backward(ticket, body(), shape, target_tokens=16)
    assert engine.freeze(StageId(2)) == 16


def test_what_a_failed_backward_has_added_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its microbatch is worked on again, and would count twice. Oracle: both sums are those of an empty round."""
    engine = span(1, 2)
    feed(engine, body())

    def broken(wave: object) -> None:
        engine.engines[StageId(1)].additions += 1
        gradient(engine.engines[StageId(1)])[0] = 1e30
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(engine.engines[StageId(1)], "backward_wave", broken)
    with pytest.raises(LocalFault, match="out of memory"):
        feed(engine, body())
    assert [one.gradient_norm() for one in engine.engines.values()] == [0.0, 0.0]
    assert [engine.freeze(stage) for stage in engine.engines] == [0, 0]


def test_a_full_device_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `LocalFault` and not torch's own error, which would end the process as a bug; the sums stay."""
    engine = span(1)
    feed(engine, body())

    def broken(wave: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(engine.engines[StageId(1)], "forward_wave", broken)
    with pytest.raises(LocalFault, match="tried to allocate 2 GiB"):
        engine.forward(body(), SHAPE, entry=StageId(1), round_id=ROUND)
    assert engine.freeze(StageId(1)) == 16


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 2 GiB"),
        MemoryError("2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 GiB"),
        OSError(errno.ENOMEM, "2 GiB"),
    ],
    ids=["cuda", "python", "cpu", "system"],
)
def test_a_full_device_makes_waves_smaller_once_and_then_a_pause(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Oracle: a wave of four that fails, with its four retries that do well; then one alone that fails too."""
    engine = span(1)
    engine.headroom.wave = 4
    own = engine.engines[StageId(1)]
    real = own.forward_wave

    def full(wave: Sequence[torch.Tensor]) -> object:
        if len(wave) > 1:
            raise error
        return real(wave)

    monkeypatch.setattr(own, "forward_wave", full)
    results = engine.forward_wave([(body(), SHAPE)] * 4, entry=StageId(1), round_id=ROUND)
    assert not any(isinstance(result, SwarmError) for result in results)
    assert (engine.wave, engine.pause()) == (2, None)

    def still_full(wave: object) -> object:
        raise error

    monkeypatch.setattr(own, "forward_wave", still_full)
    results = engine.forward_wave([(body(), SHAPE)] * 2, entry=StageId(1), round_id=ROUND)
    assert len({id(result) for result in results}) == 1, "one fault, however many are in the wave"
    pause = engine.pause()
    assert pause is not None
    assert "2 GiB" in pause.reason
    assert 0 < pause.seconds <= 600


def test_an_error_that_has_nothing_to_do_with_memory_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = span(1)

    def broken(wave: object) -> object:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(engine.engines[StageId(1)], "forward_wave", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        engine.forward(body(), SHAPE, entry=StageId(1), round_id=ROUND)
    assert engine.pause() is None


def test_a_step_that_finds_the_days_writes_spent_asks_for_a_pause() -> None:
    """Oracle: the seconds that the error names; other errors are somebody else's."""
    engine = span(1)
    assert not engine.note_fault(LocalFault("something else"))
    assert engine.pause() is None
    assert engine.note_fault(WriteBudgetSpent("today's 5 GB of writes are spent.", resumes_in_s=60.0))
    pause = engine.pause()
    assert pause is not None
    assert (pause.reason, pause.seconds) == ("today's 5 GB of writes are spent.", 60.0)
