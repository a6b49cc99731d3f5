"""Where the coordinator listens, now and after the next restart, and what its invite says.

Owns: keeping the port, choosing the addresses of the invite, and the invite itself. Must not know: the network
(it is told the addresses). A restarted coordinator has to be found at its old address, so the port that the
system chose at the first start is kept in the database.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from coordinator.settings import CoordinatorSettings
from coordinator.store import peers
from coordinator.store.database import Connection
from protocol.errors import ConfigError
from protocol.invite import Invite
from protocol.manifest import Manifest
from protocol.records import MAX_ADDRESSES
from protocol.transport.addresses import host_and_port, is_loopback, split_peer

DEFAULT_LISTEN = ("/ip4/0.0.0.0/tcp/0",)
LISTEN = "listen"
INVITE = "invite"


def where_to_listen(kept: str | None, settings: CoordinatorSettings) -> tuple[str, ...]:
    """Return what was asked for; else where we listened the last time; else any free port."""
    if settings.host_maddrs:
        return settings.host_maddrs
    return tuple(json.loads(kept)) if kept else DEFAULT_LISTEN


def with_port(listen: Sequence[str], actual: Sequence[str]) -> tuple[str, ...]:
    """Replace port 0 by the port that the system chose, as found in the addresses that are listened on."""
    return tuple(_resolved(address, actual) for address in listen)


def make_invite(manifest: Manifest, addresses: Sequence[str]) -> Invite:
    """Return the invite, without a token. This machine's loopback address is named only if there is no other."""
    elsewhere = [address for address in addresses if not is_loopback(address)]
    chosen = tuple((elsewhere or list(addresses))[:MAX_ADDRESSES])
    if not chosen:
        raise ConfigError("this machine has no address that a peer could dial.", hint="Give one with --announce.")
    return Invite(addresses=chosen, run=manifest.run_id, coordinator=manifest.coordinator)


def keep(db: Connection, *, listen: Sequence[str], invite: Invite) -> None:
    """Remember where we listen, and the invite: `coordinator invite` prints it, or adds a token to it."""
    peers.put_setting(db, LISTEN, json.dumps(list(listen)))
    peers.put_setting(db, INVITE, invite.to_text())


def kept_invite(db: Connection) -> str | None:
    """Return the invite of the last start, or None."""
    return peers.get_setting(db, INVITE)


def _resolved(address: str, actual: Sequence[str]) -> str:
    host, port = host_and_port(address)
    if port != 0:
        return address
    family = address.split("/")[1]
    for found in actual:
        way, _ = split_peer(found)
        found_host, found_port = host_and_port(way)
        if found.split("/")[1] == family and (found_host == host or host in ("0.0.0.0", "::")):
            return f"/{family}/{host}/tcp/{found_port}"
    return address
