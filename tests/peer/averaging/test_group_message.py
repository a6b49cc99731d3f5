"""The messages of a reduce. Oracle: protobuf's own encoding and decoding of `AveragingData`."""

from __future__ import annotations

import pytest
from hivemind.proto.averaging_pb2 import AVERAGED_PART, AveragingData
from hivemind.proto.runtime_pb2 import Tensor as WireTensor
from hypothesis import given
from hypothesis import strategies as st

from peer.averaging.group_message import GroupMessage
from protocol.errors import WireError

LENGTHS = (0, 1, 2, 123, 124, 125, 126, 127, 128, 129, 16_380, 16_384, 16_390, 524_288, 1_000_000)


def as_protobuf(message: GroupMessage) -> AveragingData:
    made = AveragingData(code=message.code, group_id=message.group_id, peer_id=message.peer_id)
    if message.data:
        made.tensor_part.buffer = bytes(message.data)
    return made


@pytest.mark.parametrize("code", [0, AVERAGED_PART, 99, 127, 128, 300])
@pytest.mark.parametrize("length", LENGTHS)
def test_parts_are_protobufs_bytes_and_come_back_as_a_view(length: int, code: int) -> None:
    message = GroupMessage(code=code, data=bytes(index % 251 for index in range(length)))
    wire = bytearray(b"".join(message.to_wire()))
    assert wire == as_protobuf(message).SerializeToString()
    read = GroupMessage.from_wire(wire)
    assert (read.code, bytes(read.data)) == (message.code, message.data)
    if length and code < 128:
        assert isinstance(read.data, memoryview)
        assert read.data.obj is wire


@given(code=st.integers(0, 300), group_id=st.binary(max_size=64), peer_id=st.binary(max_size=200), data=st.binary())
def test_any_message_is_protobufs(code: int, group_id: bytes, peer_id: bytes, data: bytes) -> None:
    message = GroupMessage(code=code, group_id=group_id, peer_id=peer_id, data=data)
    wire = b"".join(message.to_wire())
    assert wire == as_protobuf(message).SerializeToString()
    assert as_protobuf(GroupMessage.from_wire(bytearray(wire))) == as_protobuf(message)


@given(
    wire=st.binary(max_size=40)
    | st.builds(
        lambda *fields: b"".join(fields),
        st.sampled_from([b"", b"\x08\x05", b"\x08\x85\x01", b"\x08", b"\x2d\x00\x00\x00\x00"]),
        st.sampled_from(
            [b"\x22\x05\x0a\x03", b"\x22\x07\x0a\x03", b"\x22\x85\x00\x0a\x03", b"\x22\x03\x0a\x05", b"\x22"]
        ),
        st.sampled_from([b"abc", b"ab", b"abc\x10\x01", b"abc\x08\x01", b""]),
    )
)
def test_any_bytes_are_read_as_protobuf_reads_them(wire: bytes) -> None:
    """Also those that are nearly a part: longer or shorter than they say, with more fields, with long numbers."""
    try:
        expected = AveragingData.FromString(wire)
    except Exception:  # noqa: BLE001 - whatever it says, it is no message
        with pytest.raises(WireError):
            GroupMessage.from_wire(bytearray(wire))
        return
    read = GroupMessage.from_wire(bytearray(wire))
    assert read.code == expected.code
    assert (read.group_id, read.peer_id) == (expected.group_id, expected.peer_id)
    assert bytes(read.data) == expected.tensor_part.buffer


def test_what_hivemind_adds_is_passed_over() -> None:
    """Oracle: a part with its size, and a weight behind it, as hivemind's own averager sends them."""
    message = AveragingData(tensor_part=WireTensor(buffer=b"abc", size=[3]), weight=1.5)
    assert GroupMessage.from_wire(bytearray(message.SerializeToString())).data == b"abc"
