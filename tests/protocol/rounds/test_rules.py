"""What `peer/averaging/rules.py` makes of a manifest, for the round machine. (No torch, no peer: pure functions.)"""

from __future__ import annotations

import pytest

from peer.averaging.rules import round_rules, round_size
from protocol.batches import TaskKind, plan_round
from protocol.hops import ENTRY_CONTEXT, PathEntry
from protocol.ids import PeerId, RoundId, StageId, Version, digest
from protocol.manifest import Manifest, ModelSpec
from protocol.rounds.messages import DoneTask
from protocol.rounds.settings import RoundSize
from protocol.signing import SigningKey, seal
from tests.protocol.manifests import batch_spec, data_spec, manifest

CONFIG = (
    '{"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 257,'
    ' "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": false}'
)
LAST = SigningKey(bytes([1]) * 32)


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


@pytest.mark.parametrize(
    ("changes", "proves"),
    [
        ({}, True),
        ({"peer": PeerId("somebody else")}, False),
        ({"stages": (StageId(0),)}, False),
        ({"number": 3}, False),
        ({"round": RoundId(5)}, False),
        ({"loss_sum": 1.0}, False),
        ({"target_tokens": 65}, False),
    ],
)
def test_the_proof_of_a_number_is_the_last_stages_word_in_its_own_name(
    changes: dict[str, object], proves: bool
) -> None:
    """An entry that names another peer than its signer is nobody's word."""
    run = _manifest()
    entry = PathEntry(
        run=run.run_id,
        kind=TaskKind.TRAIN,
        round=RoundId(4),
        number=2,
        stages=(StageId(1),),
        peer=LAST.peer_id,
        version=Version(4),
        local_step=0,
        input_digest=digest(b"in"),
        output_digest=digest(b"out"),
        behind=digest(b""),
        loss_sum=1.5,
        target_tokens=64,
    )
    evidence = seal(LAST, ENTRY_CONTEXT, entry.model_copy(update=changes)).to_bytes()
    task = DoneTask(number=2, evidence=evidence, loss_sum=1.5, target_tokens=64, credits=())
    assert round_rules(run, StageId(0)).check_done(RoundId(4), task) is proves


def test_evidence_that_is_no_entry_proves_nothing() -> None:
    """And raises nothing."""
    task = DoneTask(number=2, evidence=b"trust me", loss_sum=1.5, target_tokens=64, credits=())
    assert not round_rules(_manifest(), StageId(0)).check_done(RoundId(4), task)


def _manifest() -> Manifest:
    return manifest(model=ModelSpec(config_json=CONFIG, num_stages=2, init_seed=-1))
