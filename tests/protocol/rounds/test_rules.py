"""What `peer/averaging/rules.py` makes of a manifest, for the round machine. (No torch, no peer: pure functions.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from peer.averaging.rules import done_task, round_rules, round_size
from peer.tasks import Outcome
from protocol.batches import Extent, Microbatch, TaskKind, extent_of, plan_round
from protocol.hops import MAX_PATH_ENTRIES, Evidence, PathEntry
from protocol.ids import RoundId, RunId, StageId, digest
from protocol.manifest import Manifest, ModelSpec
from protocol.paths import read_path
from protocol.rounds.messages import Credit, DoneReport, DoneTask
from protocol.rounds.settings import RoundSize
from protocol.signing import Signed, SigningKey
from protocol.wire import MAX_MESSAGE_BYTES, pack_tagged
from tests.protocol.manifests import batch_spec, data_spec, manifest
from tests.protocol.paths import sign_path

CONFIG = (
    '{"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 257,'
    ' "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": false}'
)
FIRST, LAST = SigningKey(bytes([1]) * 32), SigningKey(bytes([2]) * 32)


@pytest.mark.parametrize("heldout_sequences", [7, 8])
@pytest.mark.parametrize("eval_every", [1, 4, 30])
def test_a_rounds_size_is_that_of_its_plan(eval_every: int, heldout_sequences: int) -> None:
    """Oracle: the plan, counted. The round after the last only evaluates, and those after it are empty."""
    batch = batch_spec(eval_every=eval_every, heldout_sequences=heldout_sequences)
    for number in range(batch.num_rounds + 3):
        plan = plan_round(data_spec(), batch, RoundId(number))
        num_train = sum(microbatch.kind is TaskKind.TRAIN for microbatch in plan)
        assert round_size(batch, RoundId(number)) == RoundSize(num_train, len(plan) - num_train)


def test_a_rounds_size_is_not_counted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody's closing asks for it, and a plan of 65,536 microbatches takes seconds."""
    monkeypatch.setattr("protocol.batches.training_window", None)
    batch = batch_spec(microbatches_per_round=65_536)
    assert round_size(batch, RoundId(3)) == RoundSize(65_536)


def test_a_run_has_no_round_after_the_one_that_only_evaluates() -> None:
    """What the manifest calls `num_rounds` is that one's number."""
    assert round_rules(_manifest(), StageId(0)).last_round == 10


@pytest.mark.parametrize("heldout_sequences", [7, 8])
def test_the_extent_of_a_number_is_that_of_its_microbatch(heldout_sequences: int) -> None:
    """Oracle: the plan, counted. The last evaluation may be shorter, and what is not in the plan is nothing."""
    batch = batch_spec(eval_every=4, heldout_sequences=heldout_sequences)
    for number in range(batch.num_rounds + 3):
        plan = plan_round(data_spec(), batch, RoundId(number))
        for microbatch in plan:
            extent = Extent(microbatch.kind, len(microbatch.windows) * batch.sequence_length)
            assert extent_of(batch, RoundId(number), microbatch.number) == extent
        assert extent_of(batch, RoundId(number), len(plan)) is None


def test_the_proof_of_a_number_is_its_whole_path() -> None:
    """As it is made by who feeds, and read by the clock. Oracle: the credits, by hand."""
    task = _done(_path())
    assert [(each.stage, each.peer, each.tokens) for each in task.credits] == [
        (0, FIRST.peer_id, 64),
        (1, LAST.peer_id, 64),
    ]
    assert _is_proved(task)
    assert _is_proved(_done(_path(keys=(FIRST,), spans=((0, 1),)))), "one peer may host all stages"


def test_an_evaluation_is_proved_alike_and_earns_nothing() -> None:
    task = _done(_path(kind=TaskKind.EVAL, number=4), kind=TaskKind.EVAL)
    assert task.credits == ()
    assert _is_proved(task)
    assert not _is_proved(task.model_copy(update={"credits": _done(_path()).credits}))


@pytest.mark.parametrize(
    "common",
    [
        {"run": RunId("cd" * 16)},
        {"kind": TaskKind.EVAL},
        {"number": 3},
        {"round": RoundId(5)},
        {"loss_sum": 1.0},
        {"target_tokens": 63},
    ],
    ids=str,
)
def test_a_path_of_another_microbatch_or_loss_proves_nothing(common: dict[str, Any]) -> None:
    """All signers may agree on it: then it proves something else."""
    assert not _is_proved(_shown(_path(**common)))


@pytest.mark.parametrize(
    "path",
    [
        {"keys": (LAST,), "spans": ((1,),)},
        {"keys": (FIRST,), "spans": ((0,),)},
        {"spans": ((0,), (1, 2))},
        {"changes": ({"caller": LAST.peer_id}, {})},
        {"changes": ({}, {"caller": LAST.peer_id})},
        {"changes": ({}, {"peer": FIRST.peer_id})},
    ],
    ids=["last stage alone", "not to the end", "beyond the end", "no feeder", "another caller", "another name"],
)
def test_a_path_that_is_none_proves_nothing(path: dict[str, Any]) -> None:
    """Oracle: one thing changed of a path that proves it."""
    assert not _is_proved(_shown(_path(**path)))


@pytest.mark.parametrize(
    "changes",
    [
        {"number": 3},
        {"loss_sum": 1.0},
        {"target_tokens": 63},
        {"credits": ()},
        {"credits": (Credit(stage=StageId(0), peer=FIRST.peer_id, tokens=64),)},
        {
            "credits": (
                Credit(stage=StageId(0), peer=FIRST.peer_id, tokens=64),
                Credit(stage=StageId(1), peer=FIRST.peer_id, tokens=64),
            )
        },
    ],
    ids=["number", "loss", "tokens", "no credits", "one credit", "credit of another"],
)
def test_what_a_feeder_claims_is_what_the_path_says(changes: dict[str, Any]) -> None:
    assert not _is_proved(_done(_path()).model_copy(update=changes))


def test_no_microbatch_has_more_tokens_than_its_sequences() -> None:
    """Two of 32. All on the path may say so: the manifest knows better. An evaluation's last one may be shorter."""
    assert not _is_proved(_done(_path(target_tokens=65)))
    short = _manifest(batch=batch_spec(heldout_sequences=7))
    for tokens, proves in ((32, True), (33, False)):
        path = _path(kind=TaskKind.EVAL, number=7, target_tokens=tokens, run=short.run_id)
        assert _is_proved(_done(path, kind=TaskKind.EVAL), short) is proves


def test_the_longest_path_still_fits() -> None:
    """256 peers, and numbers as long as they get. With its credits it fits a message.

    Oracle: the decoders; a path that was too long would never prove anything, and the round would never be full.
    """
    keys = [SigningKey(number.to_bytes(32, "big")) for number in range(1, MAX_PATH_ENTRIES + 1)]
    path = sign_path(
        [{}] * len(keys),
        keys=keys,
        spans=[(60_000 + index,) for index in range(len(keys))],
        round=RoundId(1 << 40),
        version=1 << 40,
        number=1 << 17,
        target_tokens=1 << 32,
    )
    task = _done(path)
    assert read_path(Evidence.from_bytes(task.evidence).path)
    report = DoneReport(stage=StageId(0), round=RoundId(1 << 40), tasks=(task,))
    assert len(pack_tagged(report)) < MAX_MESSAGE_BYTES
    assert DoneReport.from_bytes(report.to_bytes()) == report


def test_evidence_that_is_no_path_proves_nothing() -> None:
    """And raises nothing."""
    for evidence in (b"trust me", Evidence(path=()).to_bytes(), _path()[0].to_bytes()):
        assert not _is_proved(_done(_path()).model_copy(update={"evidence": evidence}))


def _manifest(**changes: Any) -> Manifest:
    return manifest(model=ModelSpec(config_json=CONFIG, num_stages=2, init_seed=-1), **changes)


def _path(
    *,
    changes: Sequence[dict[str, Any]] = ({}, {}),
    keys: Sequence[SigningKey] = (FIRST, LAST),
    spans: Sequence[tuple[int, ...]] = ((0,), (1,)),
    **common: Any,
) -> tuple[Signed, ...]:
    return sign_path(changes, keys=keys, spans=spans, **{"run": _manifest().run_id, **common})


def _done(path: tuple[Signed, ...], kind: TaskKind = TaskKind.TRAIN) -> DoneTask:
    last = PathEntry.from_bytes(path[-1].payload)
    outcome = Outcome(None, digest(), last.loss_sum, last.target_tokens, path)
    return done_task(Microbatch(last.number, kind, ()), outcome)


def _shown(path: tuple[Signed, ...]) -> DoneTask:
    """The task of an honest path, with another one as its evidence."""
    return _done(_path()).model_copy(update={"evidence": Evidence(path=path).to_bytes()})


def _is_proved(task: DoneTask, run: Manifest | None = None) -> bool:
    return round_rules(run or _manifest(), StageId(0)).check_done(RoundId(4), task)
