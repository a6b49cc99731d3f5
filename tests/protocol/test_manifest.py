"""protocol/manifest.py: a run is its manifest, to the bit, and an impossible one does not exist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from protocol.errors import SignatureError, WireError
from protocol.manifest import MANIFEST_CONTEXT, Manifest, OptimizerName, TokenFileSpec
from protocol.signing import SigningKey, seal, unseal
from protocol.wire import PROTOCOL_VERSION
from tests.protocol.manifests import KEY, batch_spec, manifest, token_file


def test_a_manifest_survives_the_wire() -> None:
    """Oracle: equality with the original, of types too (the optimizer's name is an enum again)."""
    one = manifest()
    other = Manifest.from_bytes(one.to_bytes())
    assert other == one
    assert other.optimizer.name is OptimizerName.ADAMW8BIT
    assert other.to_bytes() == one.to_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another run"},
        {"created_s": 1_700_000_000.25},
        {"batch": batch_spec(data_seed=8)},
        {"data": manifest().data.model_copy(update={"unigram_loss": 3.2})},
        {"model": manifest().model.model_copy(update={"was_tied": True})},
        {"protocol": PROTOCOL_VERSION + 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_difference_is_another_run(change: dict[str, Any]) -> None:
    """Oracle: the id is a hash of everything."""
    assert manifest(**change).run_id != manifest().run_id


def test_a_run_id_is_32_lower_case_hex_digits() -> None:
    """Oracle: the form that file names, addresses and invites rely on."""
    run_id = manifest().run_id
    assert len(run_id) == 32
    assert set(run_id) <= set("0123456789abcdef")


def test_only_the_coordinator_can_sign_it() -> None:
    """Oracle: opened as its signer's it is the same; as somebody else's, or changed, it is refused."""
    one = manifest()
    signed = seal(KEY, MANIFEST_CONTEXT, one)
    assert unseal(signed, MANIFEST_CONTEXT, Manifest, signer=one.coordinator) == one
    stranger = SigningKey(bytes(32))
    with pytest.raises(SignatureError):
        unseal(seal(stranger, MANIFEST_CONTEXT, one), MANIFEST_CONTEXT, Manifest, signer=one.coordinator)
    changed = signed.model_copy(update={"payload": manifest(name="b run").to_bytes()})
    with pytest.raises(SignatureError):
        unseal(changed, MANIFEST_CONTEXT, Manifest, signer=one.coordinator)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("batch.sequence_length", 0),
        ("batch.microbatches_per_round", 65_537),
        ("batch.num_rounds", -1),
        ("batch.num_rounds", 1.0),
        ("batch.num_rounds", 1 << 31),
        ("batch.num_rounds", 99_999_999_999_999_999_999),
        ("batch.data_seed", 1 << 63),
        ("batch.data_seed", -(1 << 63) - 1),
        ("batch.eval_every", 0),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.learning_rate", float("inf")),
        ("optimizer.beta1", 1.0),
        ("optimizer.final_lr_fraction", 1.1),
        ("optimizer.name", "sgd"),
        ("averaging.mode", "gossip"),
        ("averaging.codec", "zip"),
        ("averaging.microbatches_per_step", 0),
        ("averaging.outer_learning_rate", 0.0),
        ("averaging.outer_learning_rate", 2.5),
        ("averaging.outer_momentum", 1.0),
        ("timing.beat_s", 0.0),
        ("optimizer.warmup_rounds", 1 << 70),
        ("keeping.checkpoints_kept", 0),
        ("keeping.checkpoint_every", 1 << 70),
        ("model.init_seed", 1 << 63),
        ("data.train.num_tokens", 1 << 60),
        ("protocol", 1 << 70),
        ("model.num_stages", 0),
        ("model.config_json", "x" * 32_769),
        ("data.unigram_loss", 0.0),
        ("name", ""),
        ("name", "x" * 65),
        ("surprise", 1),
        ("batch.surprise", 1),
    ],
)
def test_an_impossible_field_is_refused_and_named(path: str, value: Any) -> None:
    """Oracle: the bounds in the class; the error names the field."""
    fields = manifest().model_dump()
    target = fields
    *parents, last = path.split(".")
    for parent in parents:
        target = target[parent]
    target[last] = value
    with pytest.raises(WireError, match=path):
        Manifest.from_plain(fields)


def whole_numbers(spec: type[BaseModel], where: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Walk all fields that hold an integer."""
    for name, field in spec.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from whole_numbers(kind, f"{where}{name}.")
        elif kind is int:
            yield where + name, field


def test_every_whole_number_fits_what_stores_and_sends_it() -> None:
    """Oracle: SQLite and msgpack hold 64 bits; the annotations' own bounds."""
    unbounded = [
        where
        for where, field in whole_numbers(Manifest)
        if not any(getattr(bound, "lt", getattr(bound, "le", 1 << 64)) <= 1 << 63 for bound in field.metadata)
    ]
    assert not unbounded


@pytest.mark.parametrize("name", ["../train.bin", "train", "Train.bin", "train.bin/", "tr ain.bin", "a.bin\n", ""])
def test_a_token_file_cannot_be_named_into_another_folder(name: str) -> None:
    """Oracle: volunteers write a file of that name into their data directory."""
    with pytest.raises(WireError, match="name"):
        TokenFileSpec.from_plain(token_file("train.bin", 1).model_dump() | {"name": name})


@pytest.mark.parametrize(("tokens", "chunks"), [(1, 1), (512, 1), (513, 2), (1024, 2), (1025, 3)])
def test_the_last_chunk_counts_even_if_short(tokens: int, chunks: int) -> None:
    """Oracle: by hand; 512 tokens of 2 bytes fill a chunk of 1,024 bytes."""
    spec = token_file("train.bin", tokens).model_copy(update={"chunk_bytes": 1024})
    assert spec.num_bytes == tokens * 2
    assert spec.num_chunks == chunks


def test_tokens_per_round_are_all_targets_of_a_round() -> None:
    """Oracle: by hand."""
    assert batch_spec().tokens_per_round == 4 * 2 * 32


@pytest.mark.parametrize("codec", ["int4", "sparse"])
def test_a_codec_that_leaves_much_out_wants_a_mode_that_sends_it_later(codec: str) -> None:
    fields = manifest().model_dump()
    fields["averaging"] |= {"codec": codec}
    with pytest.raises(WireError, match="diloco"):
        Manifest.from_plain(fields)
    fields["averaging"] |= {"mode": "diloco"}
    assert Manifest.from_plain(fields).averaging.codec == codec
