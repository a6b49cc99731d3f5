"""What is remembered of each peer, of so many of them as there is room for. Pure.

Owns: that it is forgotten when the peer has been judged, goes along with its next key, and stays bounded. Must not
know: what it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from protocol.ids import PeerId

MAX_PEERS = 4096

Memory = TypeVar("Memory")


class ByPeer(Generic[Memory]):
    """One memory for each peer; those of whom nothing was added for longest make place."""

    def __init__(self, make: Callable[[], Memory], *, max_peers: int = MAX_PEERS) -> None:
        self._make, self._max_peers = make, max_peers
        self._known: OrderedDict[PeerId, Memory] = OrderedDict()

    def of(self, peer: PeerId) -> Memory:
        """Return what there is of a peer, to be added to."""
        known = self._known.setdefault(peer, self._make())
        self._known.move_to_end(peer)
        while len(self._known) > self._max_peers:
            self._known.popitem(last=False)
        return known

    def known(self) -> Mapping[PeerId, Memory]:
        """Return what there is of everybody."""
        return self._known

    def forget(self, peer: PeerId) -> None:
        """It has been judged, or that was taken back."""
        self._known.pop(peer, None)

    def succeed(self, before: PeerId, peer: PeerId) -> None:
        """One goes by another key now."""
        if before in self._known:
            self._known[peer] = self._known.pop(before)
