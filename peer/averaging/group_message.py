"""What members of a reduce say to each other: hivemind's `AveragingData`, without copying the part that it carries.

Owns: the fields that the reduce uses, and their way to protobuf's bytes and back. Pure. Must not know: streams, groups,
what a part means.

protobuf copies a part of 512 KiB into a message, out of it, and once more each way between message and bytes. A part is
the last field of its message, so here the head alone is made, or looked at, and the part stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError
from hivemind.proto.averaging_pb2 import AveragingData

from peer.codecs import Buffer
from protocol.errors import WireError

CODE_TAG = AveragingData.CODE_FIELD_NUMBER << 3  # a number
PART_TAG = AveragingData.TENSOR_PART_FIELD_NUMBER << 3 | 2  # a message in the message, which begins with its length
BUFFER_TAG = 1 << 3 | 2  # the first field of hivemind's `Tensor`: bytes, which begin with their length
MAX_VARINT_BYTES = 4  # no message is so long that its length takes more


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMessage:
    """One `AveragingData`."""

    code: int = 0
    group_id: bytes = b""
    peer_id: bytes = b""
    data: Buffer = b""
    """`tensor_part.buffer`."""

    def to_wire(self) -> tuple[bytes, Buffer]:
        """Return protobuf's encoding in two pieces, to be written one behind the other; the second is `data`."""
        said: bytes = AveragingData(code=self.code, group_id=self.group_id, peer_id=self.peer_id).SerializeToString()
        if not self.data:
            return said, b""
        field = bytes([BUFFER_TAG]) + _varint(len(self.data))
        return said + bytes([PART_TAG]) + _varint(len(field) + len(self.data)) + field, self.data

    @classmethod
    def from_wire(cls, wire: bytearray) -> GroupMessage:
        """Read a message; `data` is then a view of `wire`. Raises `WireError` if it is none."""
        carried = _carried_part(wire)
        if carried is not None:
            code, start = carried
            return cls(code=code, data=memoryview(wire)[start:])
        message = AveragingData()
        try:
            message.ParseFromString(wire)
        except DecodeError:
            raise WireError("what comes is no protobuf message") from None
        return cls(
            code=message.code, group_id=message.group_id, peer_id=message.peer_id, data=message.tensor_part.buffer
        )


def _carried_part(wire: bytearray) -> tuple[int, int] | None:
    """Return the code of a message that is nothing but a code and a part, and where the part begins.

    None for any other message, for anything odd, and for a code that takes more than a byte: protobuf reads those.
    """
    code, at = 0, 0
    if len(wire) > 2 and wire[0] == CODE_TAG and wire[1] < 0x80:
        code, at = wire[1], 2
    for tag in (PART_TAG, BUFFER_TAG):  # each of the two reaches to the end
        if at >= len(wire) or wire[at] != tag:
            return None
        length, at = _read_varint(wire, at + 1)
        if length != len(wire) - at:
            return None
    return code, at


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(wire: bytearray, at: int) -> tuple[int, int]:
    """Return a number and where it ends; -1 if it is too long or cut off."""
    number = 0
    for shift, byte in enumerate(wire[at : at + MAX_VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return number, at + shift + 1
    return -1, at
