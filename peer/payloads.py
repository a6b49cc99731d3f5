"""What crossed our hops lately, for those who audit our neighbours.

Owns: the bytes of activations and gradients that we sent or received, as many as there is room for. Must not know: who
is audited, what a sketch is for.

Both ends of a hop keep both directions. The newest stay: an audit comes within seconds after the round.
"""

from __future__ import annotations

from collections import OrderedDict

from protocol.audits import payload_name
from protocol.ids import Digest
from protocol.receipts import shortened

_PREFIX = payload_name(b"")


class Payloads:
    """Bytes by the shortened digest under which receipts name them."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, bytes | bytearray] = OrderedDict()
        self.num_bytes = 0

    def keep(self, digest: Digest, data: bytes | bytearray | None) -> None:
        """Keep what was sent or received, and let go of the oldest if it is too much. Not copied."""
        if data is None or len(data) > self._max_bytes:
            return
        name = shortened(digest)
        if name in self._kept:
            self._kept.move_to_end(name)
            return
        self._kept[name] = data
        self.num_bytes += len(data)
        while self.num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= len(oldest)

    def find(self, digest: bytes) -> bytes | bytearray | None:
        """Return bytes by their shortened digest, if they are still here."""
        return self._kept.get(digest)

    def resolve(self, name: str) -> bytes | memoryview | None:
        """Return what a blob name stands for."""
        text = name.removeprefix(_PREFIX)
        try:
            found = self._kept.get(bytes.fromhex(text))
        except ValueError:
            return None
        return None if found is None else memoryview(found)
