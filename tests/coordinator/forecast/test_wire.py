"""coordinator/forecast/wire.py: bytes are those of real messages and of the reduce's own cut.

Oracles: messages packed as they are sent; `peer/averaging/parts.py`, counted part by part.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.forecast import wire
from coordinator.forecast.spans import Span, spans_of
from coordinator.forecast.wire import Traffic, at_span, averaging, body_bytes, hops
from coordinator.presets import find_preset
from peer.averaging.parts import cut, cut_for_each
from protocol.batches import TaskKind
from protocol.encoding import encoded_bytes
from protocol.hops import Accepted, Answer, AnswerStatus, BodyEnd, OpenTask, PathEntry, Progress, Received, TensorSpec
from protocol.ids import Digest, Lineage, PeerId, RoundId, RunId, StageId, Version
from protocol.signing import SIGNATURE_BYTES, Signed
from protocol.wire import HEADER, Message, pack_tagged

PEER = PeerId("12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo")
DIGEST = Digest(bytes(32))
STAGE = spans_of(find_preset("bench").config, 2)[0]


def frame_bytes(*messages: Message) -> int:
    return sum(HEADER.size + len(pack_tagged(message)) for message in messages)


def entry() -> Signed:
    word = PathEntry(
        run=RunId("a" * 32),
        kind=TaskKind.TRAIN,
        round=RoundId(1234),
        number=100,
        stages=(StageId(3),),
        peer=PEER,
        caller=PEER,
        version=Version(1234),
        local_step=0,
        input_digest=DIGEST,
        output_digest=DIGEST,
        behind=DIGEST,
        loss_sum=1.5,
        target_tokens=2048,
    )
    return Signed(payload=word.to_bytes(), signer=PEER, signature=bytes(SIGNATURE_BYTES))


def answer(num_entries: int) -> Answer:
    return Answer(
        status=AnswerStatus.DONE,
        loss_sum=1.5,
        target_tokens=2048,
        path=(entry(),) * num_entries,
        body_bytes=4_000_000,
        digest=DIGEST,
        load_s=1.5,
    )


def test_messages_weigh_what_is_counted_for_them() -> None:
    request = OpenTask(
        protocol=4,
        run=RunId("a" * 32),
        kind=TaskKind.TRAIN,
        round=RoundId(1234),
        number=100,
        attempt=0,
        stage=StageId(3),
        lineage=Lineage(bytes(32)),
        version=Version(1234),
        local_step=0,
        time_left_s=1234.5,
        retries_left=3,
        tensors=(TensorSpec(name="hidden", shape=(1, 2048, 2048)),),
        codec="int8",
        body_bytes=4_000_000,
    )
    sent = frame_bytes(request, BodyEnd(digest=DIGEST), Received())
    assert sent == pytest.approx(wire.HOP_REQUEST_BYTES, rel=0.1)
    got = frame_bytes(Accepted(ttl_s=15.0), Progress(furthest_stage=StageId(3), work=1000), answer(0))
    assert got == pytest.approx(wire.HOP_ANSWER_BYTES, rel=0.1)
    assert frame_bytes(answer(4)) - frame_bytes(answer(3)) == pytest.approx(wire.PATH_ENTRY_BYTES, rel=0.1)


@pytest.mark.slow
def test_a_part_weighs_what_is_counted_for_it() -> None:
    """Oracle: hivemind's protobuf, and the marker and length that go before it on a stream."""
    from hivemind.proto.averaging_pb2 import AVERAGED_PART, AveragingData
    from hivemind.proto.runtime_pb2 import Tensor

    data = bytes(encoded_bytes("int8", 131_072))
    message = AveragingData(code=AVERAGED_PART, tensor_part=Tensor(buffer=data))
    assert message.ByteSize() + 9 - len(data) == pytest.approx(wire.PART_MESSAGE_BYTES, abs=5)


def test_a_body_comes_in_chunks_of_a_mebibyte() -> None:
    """Oracle: on paper. 1 x 2,048 x 2,048 numbers as int8 are 4 MiB and 64 KiB of scales: five chunks."""
    assert body_bytes("int8", 1 << 22) == (1 << 22) + (1 << 16) + 5 * 5
    assert body_bytes("fp32", 1000) == 4000 + 5


def test_every_way_carries_activations_there_and_gradients_back() -> None:
    """Oracle: on paper, for three spans."""
    first, second = hops(("fp16", "fp16"), 1024, num_spans=3)
    body = 2 * 1024 + 1 + 5
    assert first.forward == second.forward == body + wire.HOP_REQUEST_BYTES
    assert first.backward == body + wire.HOP_ANSWER_BYTES + 2 * wire.PATH_ENTRY_BYTES
    assert second.backward == body + wire.HOP_ANSWER_BYTES + wire.PATH_ENTRY_BYTES
    (evaluated, _) = hops(("fp16", "fp16"), 1024, num_spans=3, trains=False)
    assert evaluated.forward == first.forward
    assert evaluated.backward == first.backward - body
    assert hops(("fp16", "fp16"), 1024, num_spans=1) == ()


@given(num_spans=st.integers(1, 9))
def test_what_one_sends_another_receives(num_spans: int) -> None:
    between = hops(("int8", "fp16"), 5000, num_spans=num_spans)
    each = [at_span(between, span) for span in range(num_spans)]
    assert sum(traffic.up for traffic in each) == sum(traffic.down for traffic in each)
    assert sum(traffic.up for traffic in each) == sum(hop.forward + hop.backward for hop in between)


def sent_in_a_butterfly(span: Span, codec: str, members: int) -> list[int]:
    """Count what each member sends: the others' parts of its own values, and the parts it makes, to each other."""
    size = [0] * members
    for part in cut(span.shards, num_members=members):
        num_bytes = encoded_bytes(codec, part.length) + wire.PART_MESSAGE_BYTES
        for member in range(members):
            size[member] += num_bytes * (members - 1 if member == part.reducer else 1)
    return size


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("members", [2, 3, 8, 50])
def test_a_butterfly_costs_what_its_cut_costs(codec: str, members: int) -> None:
    """The busiest member of few parts has at most one part too many counted, where its own are short."""
    sent = sent_in_a_butterfly(STAGE, codec, members)
    found = averaging(codec, STAGE, members=members)
    assert found.mean == pytest.approx(sum(sent) / members, rel=1e-9)
    assert found.busiest == pytest.approx(max(sent), rel=0.05)
    assert found.mean == pytest.approx(2 * (members - 1) / members * STAGE.encoded_bytes(codec), rel=0.01)


@pytest.mark.parametrize("members", [2, 3, 8])
def test_an_exchange_costs_a_copy_for_every_other(members: int) -> None:
    own = [part for part in cut_for_each(STAGE.shards, num_members=members) if part.reducer == 0]
    copy = sum(encoded_bytes("sparse", part.length) + wire.PART_MESSAGE_BYTES for part in own)
    assert averaging("sparse", STAGE, members=members) == ((members - 1) * copy,) * 2


def test_nothing_is_averaged_alone() -> None:
    assert averaging("fp32", STAGE, members=1) == (0.0, 0.0)


def test_traffic_adds_up() -> None:
    assert Traffic(1.0, 2.0).plus(Traffic(10.0, 20.0)).times(2) == Traffic(22.0, 44.0)
