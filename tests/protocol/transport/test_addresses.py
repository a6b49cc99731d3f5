"""Multiaddrs as text (`protocol/transport/addresses.py`)."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ConfigError
from protocol.signing import SigningKey
from protocol.transport.addresses import (
    by_reach,
    encodable,
    host_and_port,
    is_loopback,
    is_relayed,
    listen_address,
    parse_address,
    require_peer,
    socket_family,
    split_peer,
    with_peer,
)

PEER = SigningKey(bytes(range(32))).peer_id
RELAY = SigningKey(bytes(range(1, 33))).peer_id
RELAYED = f"/ip4/203.0.113.5/tcp/4001/p2p/{RELAY}/p2p-circuit"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("/ip4/127.0.0.1/tcp/4001", "/ip4/127.0.0.1/tcp/4001"),
        ("/ip4/127.0.0.1/tcp/4001/", "/ip4/127.0.0.1/tcp/4001"),
        ("/ip6/0:0:0:0:0:0:0:1/tcp/4", "/ip6/::1/tcp/4"),
        (f"/dns4/example.org/tcp/4001/p2p/{PEER}", f"/dns4/example.org/tcp/4001/p2p/{PEER}"),
        (RELAYED, RELAYED),
    ],
)
def test_addresses_have_one_text(text: str, canonical: str) -> None:
    """Oracle: written out by hand; parsing twice changes nothing."""
    assert parse_address(text) == canonical
    assert parse_address(canonical) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "203.0.113.5:4001",
        "/ip4/127.0.0.1",
        "/ip4/127.0.0.1/tcp",
        "/ip4/127.0.0.1/tcp/99999",
        "/ip4/256.0.0.1/tcp/1",
        "/ip4/127.0.0.1/udp/4001/quic-v1",
        "/ip4/127.0.0.1/tcp/1/ws",
        "/unix/tmp/socket",
        f"/p2p/{PEER}",
        "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "/ip4/127.0.0.1/tcp/1/p2p/nonsense",
        "/ip4/127.0.0.1/tcp/1" + "/p2p-circuit" * 100,
    ],
)
def test_other_things_are_one_line_configuration_errors(text: str) -> None:
    """Oracle: E-CFG; TCP and Ed25519 ids only; the text is shown, cut to a line."""
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    assert len(caught.value.one_line()) < 300


@given(st.text(max_size=40))
def test_no_text_escapes_as_another_error(text: str) -> None:
    """Oracle: a string or a ConfigError, for any input."""
    for candidate in (text, f"/ip4/{text}/tcp/1", f"/ip4/1.2.3.4/tcp/{text}", f"/ip4/1.2.3.4/tcp/1/p2p/{text}"):
        with contextlib.suppress(ConfigError):
            assert parse_address(candidate).startswith("/")


@given(st.ip_addresses(), st.integers(min_value=0, max_value=65535))
def test_listen_addresses_round_trip(ip: object, port: int) -> None:
    """Oracle: the host and port that went in come out."""
    address = listen_address(str(ip), port)
    assert parse_address(address) == address
    host, found_port = host_and_port(address)
    assert (ipaddress.ip_address(host), found_port) == (ip, port)


@pytest.mark.parametrize(("host", "port"), [("localhost", 1), ("0.0.0.0", 65536), ("0.0.0.0", -1), ("", 1)])
def test_bad_listen_addresses_are_refused(host: str, port: int) -> None:
    """Oracle: an IP address and a 16-bit port."""
    with pytest.raises(ConfigError):
        listen_address(host, port)


def test_peers_come_off_and_go_on() -> None:
    """Oracle: with_peer undoes split_peer."""
    plain = "/ip4/203.0.113.5/tcp/4001"
    assert split_peer(plain) == (plain, None)
    full = with_peer(plain, PEER)
    assert full == f"{plain}/p2p/{PEER}"
    assert split_peer(full) == (plain, PEER)
    assert with_peer(full, PEER) == full
    assert require_peer(full) == (plain, PEER)
    with pytest.raises(ConfigError):
        with_peer(full, RELAY)
    with pytest.raises(ConfigError):
        require_peer(plain)


def test_the_peer_of_a_relayed_address_is_the_one_behind_the_relay() -> None:
    """Oracle: libp2p's circuit addresses: /<relay>/p2p-circuit/p2p/<destination>."""
    assert split_peer(RELAYED) == (RELAYED, None)
    assert split_peer(with_peer(RELAYED, PEER)) == (RELAYED, PEER)
    assert is_relayed(RELAYED)
    assert not is_relayed("/ip4/203.0.113.5/tcp/4001")


def test_loopback_is_known_by_ip_and_by_name() -> None:
    """Oracle: RFC 1122 and RFC 4291 loopback ranges."""
    assert is_loopback("/ip4/127.8.9.1/tcp/1")
    assert is_loopback("/ip6/::1/tcp/1")
    assert is_loopback("/dns4/localhost/tcp/1")
    assert not is_loopback("/ip4/0.0.0.0/tcp/1")
    assert not is_loopback("/dns4/example.org/tcp/1")


def test_families_and_bytes() -> None:
    """Oracle: the multiaddr table (ip4 = 0x04, tcp = 0x06, p2p = 0xa503, then one length byte for the id)."""
    assert socket_family("/ip4/0.0.0.0/tcp/1") == socket.AF_INET
    assert socket_family("/ip6/::/tcp/1") == socket.AF_INET6
    raw = encodable(f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}").to_bytes()
    assert raw.hex().startswith("047f000001060001a50326002408011220")


def test_addresses_that_the_world_can_dial_come_first() -> None:
    """Oracle: the order by hand; of many only the first are announced."""
    addresses = ["/ip4/127.0.0.1/tcp/1", "/ip4/172.17.0.1/tcp/1", "/ip4/8.8.8.8/tcp/1", "/ip6/::1/tcp/1"]
    addresses += ["/dns/home.example/tcp/1", "/ip4/192.168.1.2/tcp/1"]
    assert sorted(addresses, key=by_reach) == [
        "/ip4/8.8.8.8/tcp/1",
        "/dns/home.example/tcp/1",
        "/ip4/172.17.0.1/tcp/1",
        "/ip4/192.168.1.2/tcp/1",
        "/ip4/127.0.0.1/tcp/1",
        "/ip6/::1/tcp/1",
    ]
