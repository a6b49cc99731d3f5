"""Waves through a span: what one by one would bring, and an error for whom it belongs to. Oracles: a span that is asked
for the same one by one; the engines' own statistics and sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch

from peer.engine import stage_engine
from peer.engine.span import SpanEngine, SpanLoss, SpanTicket
from peer.engine.stage_engine import StageEngine
from peer.engine.wave import settled
from peer.tasks import RoundOver
from protocol.errors import CorpusError, LocalFault, PeerFault, SwarmError, WireError
from protocol.ids import RoundId, StageId
from tests.peer.engine.poke import gradients
from tests.peer.engine.test_span import FP32, MICROBATCH, ROUND, SHAPE, WIDTH, body, held, not_finite, span

if TYPE_CHECKING:
    from peer.engine.span import TokenArray

Passed = tuple[bytes, tuple[int, ...], SpanTicket]

NUM_TOKENS = MICROBATCH[0] * MICROBATCH[1]


def drawn(seed: int, sequences: int = MICROBATCH[0]) -> tuple[bytes, tuple[int, ...]]:
    """Return a body of its own, with its shape."""
    shape = (sequences, MICROBATCH[1], WIDTH)
    values = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(seed))
    return FP32.encode(values), shape


def labels(seed: int, sequences: int = MICROBATCH[0]) -> TokenArray:
    generator = torch.Generator().manual_seed(seed)
    tokens: TokenArray = torch.randint(0, 512, (sequences, MICROBATCH[1]), generator=generator).numpy()
    return tokens


def forward(engine: SpanEngine, wave: Sequence[tuple[Any, tuple[int, ...]]]) -> list[Passed | SwarmError]:
    return engine.forward_wave(wave, entry=engine.first, round_id=ROUND)


def good(results: Sequence[Passed | SwarmError]) -> list[Passed]:
    return [each for each in results if not isinstance(each, SwarmError)]


def sums(engine: SpanEngine) -> list[torch.Tensor]:
    return [shard for one in engine.engines.values() for shard in gradients(one)]


def equal(ours: SpanEngine, theirs: SpanEngine) -> bool:
    return all(torch.equal(a, b) for a, b in zip(sums(ours), sums(theirs), strict=True))


def counted(engine: SpanEngine) -> list[int]:
    return [engine.accumulated_tokens[stage] for stage in engine.engines]


# -- the same as one by one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [(0,), (1,), (1, 2), (0, 1, 2)])
def test_a_wave_is_its_microbatches_one_by_one(stages: tuple[int, ...]) -> None:
    """Also where they are of different sizes. Oracle: bodies, gradients, sums and tokens, bit for bit."""
    waved, single = span(*stages), span(*stages)
    sequences = (2, 1, 2)
    if 0 in stages:
        inputs: list[tuple[Any, tuple[int, ...]]] = [(labels(n, s), (s, 8)) for n, s in enumerate(sequences)]
    else:
        inputs = [drawn(n, s) for n, s in enumerate(sequences)]
    passed = good(forward(waved, inputs))
    alone = [single.forward(*each, entry=single.first, round_id=ROUND) for each in inputs]
    assert [each[:2] for each in passed] == [each[:2] for each in alone]
    back = [drawn(10 + n, s) for n, s in enumerate(sequences)]
    order = (2, 0, 1)
    results = waved.backward_wave([(passed[n][2], *back[n], 8 * sequences[n]) for n in order])
    assert results == [single.backward(alone[n][2], *back[n], target_tokens=8 * sequences[n]) for n in order]
    assert equal(waved, single)
    assert counted(waved) == counted(single) == [40] * len(stages)
    assert held(waved) == held(single) == 0
    assert not waved._waiting


@pytest.mark.parametrize("stages", [(3,), (2, 3), (1, 2, 3)])
def test_a_wave_of_losses_is_its_microbatches_one_by_one(stages: tuple[int, ...]) -> None:
    """Oracle: losses, target tokens, gradients by the inputs, sums, bit for bit."""
    waved, single = span(*stages), span(*stages)
    ignored = labels(7)
    ignored[:, ::2] = -100  # half of them are no targets
    wave = [(*drawn(1), labels(5)), (*drawn(2), ignored), (*drawn(3, 1), labels(6, 1))]
    results = waved.loss_wave(wave, entry=waved.first, round_id=ROUND)
    assert results == [
        single.loss_and_backward(source, shape, own, entry=single.first, round_id=ROUND) for source, shape, own in wave
    ]
    assert [each.target_tokens for each in results if isinstance(each, SpanLoss)] == [16, 8, 8]
    assert equal(waved, single)
    assert counted(waved) == [32] * len(stages)
    assert held(waved) == 0


def test_a_wave_through_the_whole_model() -> None:
    """A span that is first and last at once has no gradient to send. Oracle: one by one."""
    waved, single = span(0, 1, num_stages=2), span(0, 1, num_stages=2)
    wave = [(labels(n), MICROBATCH, labels(10 + n)) for n in range(3)]
    results = waved.loss_wave(wave, entry=StageId(0), round_id=ROUND)
    assert results == [
        single.loss_and_backward(source, shape, own, entry=StageId(0), round_id=ROUND) for source, shape, own in wave
    ]
    assert all(isinstance(each, SpanLoss) and each.gradient is None for each in results)
    assert equal(waved, single)


def test_a_wave_may_enter_in_the_middle_of_a_span() -> None:
    """Oracle: a span of the later stage alone; the earlier one counts nothing."""
    wide, narrow = span(1, 2), span(2)
    outcomes = []
    for engine in (wide, narrow):
        passed = good(engine.forward_wave([drawn(1), drawn(2)], entry=StageId(2), round_id=ROUND))
        outcomes.append(engine.backward_wave([(ticket, *drawn(9), 16) for _, _, ticket in passed]))
    assert outcomes[0] == outcomes[1]
    assert counted(wide) == [0, 32]


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [(0,), (1, 2)])
def test_an_evaluation_wave_is_its_microbatches_one_by_one(stages: tuple[int, ...]) -> None:
    """Oracle: the same bodies, bit for bit; nothing is kept, whatever the round."""
    waved, single = span(*stages), span(*stages)
    inputs: list[tuple[Any, tuple[int, ...]]] = [drawn(n, s) for n, s in enumerate((2, 1, 2))]
    if 0 in stages:
        inputs = [(labels(n, s), (s, 8)) for n, s in enumerate((2, 1, 2))]
    results = waved.forward_only_wave(inputs, entry=waved.first)
    assert results == [single.forward_only(*each, entry=single.first) for each in inputs]
    assert len({result[0] for result in results if not isinstance(result, SwarmError)}) == 3, "of three inputs"
    assert held(waved) == 0


@pytest.mark.parametrize("stages", [(3,), (2, 3)])
def test_an_evaluation_wave_of_losses_is_its_microbatches_one_by_one(stages: tuple[int, ...]) -> None:
    """Oracles: the same losses, bit for bit; those that training finds; no gradient, no sums, no tokens counted."""
    waved, single, trained = span(*stages), span(*stages), span(*stages)
    wave = [(*drawn(1), labels(5)), (*drawn(2), labels(6)), (*drawn(3, 1), labels(7, 1))]
    results = waved.evaluate_wave(wave, entry=waved.first)
    assert results == [single.evaluate(*each, entry=single.first) for each in wave]
    losses = [result for result in results if isinstance(result, SpanLoss)]
    found = [trained.loss_and_backward(*each, entry=trained.first, round_id=ROUND) for each in wave]
    assert [loss.loss_sum for loss in losses] == pytest.approx([loss.loss_sum for loss in found])
    assert [(loss.target_tokens, loss.gradient) for loss in losses] == [(16, None), (16, None), (8, None)]
    assert not any(each.any() for each in sums(waved))
    assert counted(waved) == [0] * len(stages)
    assert held(waved) == 0


def test_an_evaluation_wave_goes_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: each engine is called once for all, so a layer comes once for all."""
    engine = span(2, 3)
    sizes: list[int] = []

    def noted(one: StageEngine, method: str) -> None:
        real = getattr(one, method)

        def call(wave: Sequence[object]) -> object:
            sizes.append(len(wave))
            return real(wave)

        monkeypatch.setattr(one, method, call)

    before, last = engine.engines.values()
    noted(before, "forward_only_wave")
    noted(last, "evaluate_wave")
    engine.evaluate_wave([(*drawn(n), labels(n)) for n in range(3)], entry=StageId(2))
    assert sizes == [3, 3]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_wrong_with_one_evaluation_is_its_own_error(position: int) -> None:
    """A body that no model makes, or tokens that no vocabulary has. Oracle: the others, one by one."""
    engine, wave = span(3), [(*drawn(1), labels(1)), (*drawn(2), labels(2))]
    alone = [engine.evaluate(*each, entry=StageId(3)) for each in wave]
    unknown = labels(3)
    unknown[0, 0] = 512
    for bad, kind in (((body(1e9), SHAPE, labels(3)), PeerFault), ((*drawn(3), unknown), CorpusError)):
        results = engine.evaluate_wave([*wave[:position], bad, *wave[position:]], entry=StageId(3))
        assert isinstance(results.pop(position), kind)
        assert results == alone


def test_an_evaluation_wave_for_which_there_is_no_room_goes_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the losses without a limit; waves are smaller afterwards."""
    engine, wave = span(3), [(*drawn(n), labels(n)) for n in range(4)]
    engine.headroom.wave = 4
    expected = engine.evaluate_wave(wave, entry=StageId(3))
    own = engine.engines[StageId(3)]
    real = own.evaluate_wave

    def full(wave: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> object:
        if len(wave) > 1:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return real(wave)

    monkeypatch.setattr(own, "evaluate_wave", full)
    assert engine.evaluate_wave(wave, entry=StageId(3)) == expected
    assert (engine.wave, engine.pause()) == (2, None)


def test_a_long_wave_shows_that_it_goes_on() -> None:
    """Neighbours would take a peer that shows nothing for dead. Oracle: a sign for every microbatch at every layer."""
    engine = span(1)
    signs: list[bool] = []
    engine.engines[StageId(1)]._memory.on_progress = lambda: signs.append(True)
    counts = []
    for size in (1, 2, 3):
        before = len(signs)
        forward(engine, [drawn(n) for n in range(size)])
        counts.append(len(signs) - before)
    num_layers = counts[1] - counts[0]
    assert num_layers >= 1
    assert counts == [num_layers * (1 + size) for size in (1, 2, 3)]


# -- one bad apple ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ((b"\x01\x02", SHAPE), WireError),
        ((not_finite(), SHAPE), WireError),
        ((body(1e9), SHAPE), PeerFault),
    ],
    ids=["length", "not finite", "no model"],
)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_bad_body_is_its_own_error(bad: tuple[bytes, tuple[int, ...]], kind: type[SwarmError], position: int) -> None:
    """Oracle: one by one, without it."""
    engine, other = span(1, 2), span(1, 2)
    wave = [drawn(1), drawn(2)]
    results = forward(engine, [*wave[:position], bad, *wave[position:]])
    assert isinstance(results[position], kind)
    passed = good(results)
    assert [each[:2] for each in passed] == [each[:2] for each in good(forward(other, wave))]
    assert held(engine) == 4
    for _, _, ticket in passed:
        engine.discard(ticket)
    assert held(engine) == 0


def test_bad_tokens_are_their_own_error() -> None:
    """Oracle: the others' bodies."""
    engine, other = span(0), span(0)
    wrong = labels(1)
    wrong[0, 3] = 512
    results = forward(engine, [(labels(2), MICROBATCH), (wrong, MICROBATCH), (labels(3), MICROBATCH)])
    assert isinstance(results[1], CorpusError)
    expected = good(forward(other, [(labels(2), MICROBATCH), (labels(3), MICROBATCH)]))
    assert [each[:2] for each in good(results)] == [each[:2] for each in expected]


@pytest.mark.parametrize(
    ("bad", "kind"),
    [(b"\x01\x02", WireError), (not_finite(), WireError), (body(1e9), PeerFault)],
    ids=["length", "not finite", "no model"],
)
def test_a_bad_gradient_is_its_own_error_and_adds_nothing(bad: bytes, kind: type[SwarmError]) -> None:
    """Oracle: a span that never got it; the ticket is still there for the runner to discard."""
    engine, other = span(1, 2), span(1, 2)
    tickets = [ticket for _, _, ticket in good(forward(engine, [drawn(n) for n in range(3)]))]
    others = [ticket for _, _, ticket in good(forward(other, [drawn(n) for n in range(3)]))]
    back, shape = drawn(9)
    results = engine.backward_wave(
        [(tickets[0], back, shape, 16), (tickets[1], bad, shape, 16), (tickets[2], back, shape, 16)]
    )
    expected = other.backward_wave([(others[0], back, shape, 16), (others[2], back, shape, 16)])
    assert isinstance(results[1], kind)
    assert [results[0], results[2]] == expected
    assert equal(engine, other)
    assert counted(engine) == [32, 32]
    assert held(engine) == 2
    engine.discard(tickets[1])
    assert held(engine) == 0


def test_a_bad_label_is_its_own_error() -> None:
    """Oracle: a span that never got it."""
    engine, other = span(2, 3), span(2, 3)
    outside, short = labels(1), labels(1, 1)
    outside[1, 1] = 512
    wave = [(*drawn(1), labels(1)), (*drawn(2), outside), (*drawn(3), short), (*drawn(4), labels(4))]
    results = engine.loss_wave(wave, entry=StageId(2), round_id=ROUND)
    assert isinstance(results[1], CorpusError)
    assert isinstance(results[2], PeerFault)
    expected = other.loss_wave([wave[0], wave[3]], entry=StageId(2), round_id=ROUND)
    assert [results[0], results[3]] == expected
    assert equal(engine, other)
    assert counted(engine) == [32, 32]
    assert held(engine) == 0


@pytest.mark.parametrize("call", ["forward", "backward", "loss"])
def test_a_wave_of_nothing_but_errors_computes_nothing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = span(2) if call != "loss" else span(3)
    tickets = [] if call != "backward" else [ticket for _, _, ticket in good(forward(engine, [drawn(1), drawn(2)]))]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing can be computed here")

    for name in ("forward_wave", "backward_wave", "loss_wave"):
        monkeypatch.setattr(StageEngine, name, refuse)
    results: Sequence[object]
    if call == "forward":
        results = forward(engine, [(b"", SHAPE), (b"", SHAPE)])
    elif call == "backward":
        results = engine.backward_wave([(ticket, b"", SHAPE, 16) for ticket in tickets])
    else:
        results = engine.loss_wave([(b"", SHAPE, labels(1))] * 2, entry=StageId(3), round_id=ROUND)
    assert [type(each) for each in results] == [WireError, WireError]


# -- what fails on this machine ---------------------------------------------------------------------------------------


def failing(engine: SpanEngine, stage: int, name: str, monkeypatch: pytest.MonkeyPatch, *, least: int) -> list[int]:
    """Let a stage's waves of `least` or more fail; return the list of the sizes that it is asked for."""
    one, sizes = engine.engines[StageId(stage)], []
    original = getattr(one, name)

    def broken(wave: Sequence[Any]) -> object:
        sizes.append(len(wave))
        if len(wave) >= least:
            raise LocalFault("the machine is on fire.")
        return original(wave)

    monkeypatch.setattr(one, name, broken)
    return sizes


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_forward_wave_that_fails_here_is_tried_one_by_one(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them may have brought numbers that overflow. Oracle: a span where nothing fails, there and back again,
    whichever stage it was."""
    engine, other = span(0, 1, 2), span(0, 1, 2)
    sizes = failing(engine, stage, "forward_wave", monkeypatch, least=2)
    wave = [(labels(n), MICROBATCH) for n in range(3)]
    passed, expected = good(forward(engine, wave)), good(forward(other, wave))
    assert sizes == [3, 1, 1, 1]
    assert [each[:2] for each in passed] == [each[:2] for each in expected]
    assert held(engine) == 9
    back = [
        each.backward_wave([(ticket, *drawn(9), 16) for _, _, ticket in tasks])
        for each, tasks in ((engine, passed), (other, expected))
    ]
    assert back[0] == back[1]
    assert equal(engine, other)
    assert counted(engine) == [48, 48, 48]
    assert held(engine) == 0


def test_only_who_overflows_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second stage. Oracle: LocalFault for the one with huge numbers; for the others what they would have got
    without it."""
    monkeypatch.setattr(stage_engine, "MAX_MAGNITUDE", math.inf)
    engine, other = span(1, 2), span(1, 2)
    second, original = engine.engines[StageId(2)], StageEngine.forward_wave

    def overflowing(wave: Sequence[torch.Tensor]) -> object:
        if any(float(each.abs().max()) > 1e30 for each in wave):
            raise LocalFault("the hidden states that this machine computed are not finite.")
        return original(second, wave)

    monkeypatch.setattr(second, "forward_wave", overflowing)
    results = forward(engine, [drawn(1), (body(3e38), SHAPE), drawn(2)])
    assert isinstance(results[1], LocalFault)
    expected = good(forward(other, [drawn(1), drawn(2)]))
    assert [each[:2] for each in good(results)] == [each[:2] for each in expected]
    assert held(engine) == 4
    for _, _, ticket in good(results):
        assert isinstance(engine.backward(ticket, *drawn(9), target_tokens=16), bytes)
    assert held(engine) == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_a_backward_wave_that_fails_fails_for_all(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was added cannot be taken back, so nobody is tried again. Oracle: the very same error; nothing is held;
    what was counted of a stage that has added is dropped."""
    engine = span(1, 2)
    before = good(forward(engine, [drawn(5)]))[0]
    engine.backward(before[2], *drawn(9), target_tokens=16)
    tickets = [ticket for _, _, ticket in good(forward(engine, [drawn(1), drawn(2)]))]
    failing(engine, stage, "backward_wave", monkeypatch, least=2)
    results = engine.backward_wave([(ticket, *drawn(9), 16) for ticket in tickets])
    assert isinstance(results[0], LocalFault)
    assert results[0] is results[1]
    assert held(engine) == 0
    assert not engine._waiting
    assert counted(engine) == ([16, 0] if stage == 1 else [16, 16])


def test_a_loss_wave_that_fails_fails_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = span(2, 3)
    failing(engine, 3, "loss_wave", monkeypatch, least=1)
    wave = [(*drawn(1), labels(1)), (b"", SHAPE, labels(2)), (*drawn(2), labels(2))]
    results = engine.loss_wave(wave, entry=StageId(2), round_id=ROUND)
    assert isinstance(results[0], LocalFault)
    assert results[0] is results[2]
    assert isinstance(results[1], WireError)
    assert held(engine) == 0
    assert counted(engine) == [0, 0]


# -- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["forward", "backward", "loss"])
def test_when_the_round_is_over_it_is_over_for_all(call: str) -> None:
    """Oracle: RoundOver, and sums of zero."""
    engine = span(1, 2) if call != "loss" else span(2, 3)
    tickets = [] if call != "backward" else [ticket for _, _, ticket in good(forward(engine, [drawn(1), drawn(2)]))]
    engine.freeze(engine.last)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(engine, [drawn(1), drawn(2)]),
        "backward": lambda: engine.backward_wave([(ticket, *drawn(9), 16) for ticket in tickets]),
        "loss": lambda: engine.loss_wave([(*drawn(1), labels(1))] * 2, entry=StageId(2), round_id=ROUND),
    }
    with pytest.raises(RoundOver):
        calls[call]()
    assert not any(each.any() for each in sums(engine))
    for ticket in tickets:
        engine.discard(ticket)
    assert held(engine) == 0


def test_a_wave_of_another_round_is_over_too() -> None:
    engine = span(1)
    with pytest.raises(RoundOver):
        engine.forward_wave([drawn(1)], entry=StageId(1), round_id=RoundId(ROUND + 1))


def test_settled_is_the_one_result_or_its_error() -> None:
    error = PeerFault("nonsense")
    assert settled([3]) == 3
    with pytest.raises(PeerFault) as caught:
        settled([error])
    assert caught.value is error
