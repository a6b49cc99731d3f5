"""Multiaddrs: parsed and printed here with the `multiaddr` package, plain strings everywhere else.

Owns: what counts as an address, its one canonical text, and taking peer ids off and putting them on. Must not
know: sockets, p2pd. Called by whoever reads an address from a flag, an invite or a record, and by `node.py`.

hivemind has a multiaddr class of its own that encodes `/p2p/<id>` wrongly and refuses this package's objects,
so it only ever gets strings; the one call that needs bytes (`Node.connect`) gets `encodable`.
"""

from __future__ import annotations

import ipaddress
import socket

import multiaddr
import multiaddr.exceptions

from protocol.errors import ConfigError, SignatureError
from protocol.ids import PeerId
from protocol.signing import public_key_of

MAX_ADDRESS_CHARS = 256  # a relayed address with two peer ids takes about 160
_HOST_PROTOCOLS = frozenset({"ip4", "ip6", "dns", "dns4", "dns6"})


def parse_address(text: str) -> str:
    """Return the canonical text of a TCP multiaddr, with or without `/p2p/<id>`, or raise `ConfigError`."""
    address = _parse(text)
    names = [protocol.name for protocol in address.protocols()]
    if len(names) < 2 or names[0] not in _HOST_PROTOCOLS or names[1] != "tcp":
        raise ConfigError(f"{_shown(text)} is not a TCP address.", hint="Write it like /ip4/203.0.113.5/tcp/4001.")
    if unknown := set(names[2:]) - {"p2p", "p2p-circuit"}:
        raise ConfigError(f"{_shown(text)} uses {', '.join(sorted(unknown))}, which is not supported.")
    for protocol, value in address.items():
        if protocol.name == "p2p":
            _check_peer(str(value), text)
    return str(address)


def with_peer(address: str, peer_id: PeerId) -> str:
    """Return `address` ending in `/p2p/<peer_id>`; one that ends in another peer's id is a `ConfigError`."""
    transport, present = split_peer(address)
    if present is not None and present != peer_id:
        raise ConfigError(f"{address} belongs to {present}, not to {peer_id}.")
    return f"{transport}/p2p/{peer_id}"


def split_peer(address: str) -> tuple[str, PeerId | None]:
    """Split a canonical address into the way to a peer and the peer itself (None if it names none).

    In a relayed address the peer is the one behind `/p2p-circuit`; the relay's id stays part of the way.
    """
    canonical = parse_address(address)
    way, separator, last = canonical.rpartition("/p2p/")
    if not separator or "/" in last:  # no id at all, or one that is followed by /p2p-circuit
        return canonical, None
    return way, PeerId(last)


def require_peer(address: str) -> tuple[str, PeerId]:
    """Like `split_peer`, for places where an address without a peer id is a `ConfigError`."""
    way, peer_id = split_peer(address)
    if peer_id is None:
        raise ConfigError(f"{address} does not end in /p2p/<peer id>.")
    return way, peer_id


def listen_address(host: str, port: int) -> str:
    """Return the multiaddr that listens on an IP address and TCP port; port 0 lets the system choose."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(f"{host!r} is not an IP address to listen on.") from None
    if not 0 <= port <= 65535:
        raise ConfigError(f"{port} is not a TCP port.")
    return parse_address(f"/ip{ip.version}/{ip}/tcp/{port}")


def host_and_port(address: str) -> tuple[str, int]:
    """Return the first host (an IP address or a name) and TCP port of an address."""
    parts = parse_address(address).split("/")
    return parts[2], int(parts[4])


def is_loopback(address: str) -> bool:
    """Tell whether an address only leads to this machine."""
    host, _ = host_and_port(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def by_reach(address: str) -> int:
    """Return a sort key: addresses that the world can dial first, then a home's own network, then this machine."""
    host, _ = host_and_port(address)
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:  # a name was given by somebody who wants it dialled
        return 0
    return 2 if ip.is_loopback else int(not ip.is_global)


def is_relayed(address: str) -> bool:
    """Tell whether an address leads through another peer."""
    return "p2p-circuit" in parse_address(address).split("/")


def socket_family(address: str) -> socket.AddressFamily:
    """Return the socket family that listens on an address (`AF_INET6` for ip6, else `AF_INET`)."""
    return socket.AF_INET6 if parse_address(address).startswith("/ip6/") else socket.AF_INET


def encodable(address: str) -> multiaddr.Multiaddr:
    """Return an object whose `to_bytes()` is the address as p2pd understands it."""
    return _parse(address)


def _parse(text: str) -> multiaddr.Multiaddr:
    if not 0 < len(text) <= MAX_ADDRESS_CHARS:
        raise ConfigError(f"{_shown(text)} is not a multiaddr.", hint="Write it like /ip4/203.0.113.5/tcp/4001.")
    try:
        return multiaddr.Multiaddr(text)
    except (multiaddr.exceptions.Error, ValueError) as error:
        reason = str(getattr(error, "message", "") or error).splitlines()[0]
        raise ConfigError(f"{_shown(text)} is not a multiaddr: {reason[:120]}") from None


def _check_peer(peer_id: str, text: str) -> None:
    try:
        public_key_of(peer_id)
    except SignatureError:
        raise ConfigError(f"{_shown(text)} names a peer whose id is not an Ed25519 key.") from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
