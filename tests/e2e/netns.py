"""Network namespaces in which the processes of a swarm live, as homes do on the internet. Needs root.

Owns: making them, limiting and cutting lines, and that they are gone afterwards, whatever happens short of SIGKILL.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.e2e.swarm import Place

HUB = "coordinator"
BURST_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Homes:
    """A hub, where the coordinator lives, and a home for every peer, joined by a bridge."""

    places: Mapping[str, Place]

    def limit(self, *, up_mbps: int, down_mbps: int) -> None:
        """Put a token bucket on both directions of every peer's line."""
        hub = self.places[HUB].netns
        for name, place in self.places.items():
            if name != HUB:
                _limit(place.netns, "home", up_mbps)
                _limit(hub, name, down_mbps)

    def cut(self, one: Sequence[str], other: Sequence[str]) -> None:
        """Let peers of two groups not reach each other any more. The hub reaches everybody."""
        self._route("add", one, other)

    def mend(self, one: Sequence[str], other: Sequence[str]) -> None:
        """Undo a cut."""
        self._route("del", one, other)

    def _route(self, what: str, one: Sequence[str], other: Sequence[str]) -> None:
        for here, there in [(a, b) for a in one for b in other] + [(b, a) for a in one for b in other]:
            _ip("-n", self.places[here].netns, "route", what, "blackhole", f"{self.places[there].address}/32")


@contextmanager
def homes(*names: str) -> Iterator[Homes]:
    """Make a hub and one namespace per peer while the block runs."""
    prefix = f"handcar-{os.getpid()}-"
    places = {name: Place(prefix + name, f"10.77.0.{number}") for number, name in enumerate((HUB, *names), start=1)}
    hub = places[HUB].netns
    try:
        for place in places.values():
            _ip("netns", "add", place.netns)
            _ip("-n", place.netns, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "addr", "add", f"{places[HUB].address}/24", "dev", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for name in names:
            place = places[name]
            _ip("-n", hub, "link", "add", name, "type", "veth", "peer", "name", "home", "netns", place.netns)
            _ip("-n", hub, "link", "set", name, "master", "bridge", "up")
            _ip("-n", place.netns, "addr", "add", f"{place.address}/24", "dev", "home")
            _ip("-n", place.netns, "link", "set", "home", "up")
        yield Homes(places)
    finally:
        for place in places.values():
            subprocess.run(["ip", "netns", "del", place.netns], check=False, capture_output=True, timeout=30)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


def _limit(netns: str, device: str, mbps: int) -> None:
    bucket = ("rate", f"{mbps}mbit", "burst", str(BURST_BYTES), "latency", "200ms")
    argv = ["tc", "-n", netns, "qdisc", "add", "dev", device, "root", "tbf", *bucket]
    subprocess.run(argv, check=True, timeout=30)
