"""What libp2p says about a peer that it cannot reach, and what we make of it. Oracle: its own words, by hand."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from pathlib import Path

import pytest

from protocol.transport import dial
from protocol.transport.dial import hang_up, is_refused

LOOPBACK = "/ip4/127.0.0.1/tcp/52473"
PRIVATE = "/ip4/192.168.1.7/tcp/4001"
PUBLIC = "/ip4/8.8.8.8/tcp/4001"
PUBLIC6 = "/ip6/2001:4860:4860::8888/tcp/4001"
RELAYED = f"{PUBLIC}/p2p/12D3KooWGzBtXVcJH6mFEYqZjZ9ttGzV8uzdZp7J2bMLwQ5D5jkC/p2p-circuit"
REFUSED, NO_ROUTE, LATE = "connect: connection refused", "connect: no route to host", "i/o timeout"


def said(*attempts: tuple[str, str]) -> str:
    """Put together what p2pd answers: one line for each address."""
    lines = (f"  * [{address}] dial tcp {address.split('/')[2]}: {outcome}" for address, outcome in attempts)
    return "\n".join(["Connect failed. msg=failed to dial: failed to dial 12D3Koo: all dials failed", *lines])


@pytest.mark.parametrize(
    "attempts",
    [
        [(LOOPBACK, REFUSED)],
        [(LOOPBACK, REFUSED), (PRIVATE, REFUSED)],
        [(LOOPBACK, REFUSED), (PUBLIC, REFUSED)],
        [(PUBLIC6, REFUSED)],
    ],
    ids=["only loopback", "only local", "loopback and public", "public"],
)
def test_who_is_refused_everywhere_is_gone(attempts: list[tuple[str, str]]) -> None:
    assert is_refused(said(*attempts))


@pytest.mark.parametrize("outcome", [NO_ROUTE, LATE, "dial backoff", "connect: network is unreachable"])
@pytest.mark.parametrize("local", [LOOPBACK, PRIVATE])
def test_one_refusal_is_not_enough(local: str, outcome: str) -> None:
    """Otherwise a home whose line is down takes all the others for dead: its own machine refuses at their loopback."""
    for attempts in itertools.permutations([(local, REFUSED), (PUBLIC, outcome)]):
        assert not is_refused(said(*attempts))


@pytest.mark.parametrize(
    "words",
    [
        "failed to find any peer in table: connection refused",
        said((PUBLIC, REFUSED)) + "\n    ... skipping 3 errors due to space limitations",
        said((PUBLIC, REFUSED), (RELAYED, REFUSED)),
        said((PUBLIC, f"{REFUSED} by policy")),
        said(),
    ],
    ids=["no list", "not the whole list", "a relay's refusal", "other words", "nothing tried"],
)
def test_what_says_less_is_not_certain(words: str) -> None:
    assert not is_refused(words)


async def test_a_peer_that_does_not_read_cannot_hold_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the transport, which would otherwise wait for the other end to read what is still to be sent."""
    monkeypatch.setattr(dial, "LAST_WORD_S", 0.05)
    path = Path(tempfile.mkdtemp()) / "socket"
    served: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
    server = await asyncio.start_unix_server(lambda _, writer: served.put_nowait(writer), path)
    _, mute = await asyncio.open_unix_connection(path)
    mute.transport.pause_reading()  # type: ignore[attr-defined]
    writer = await served.get()
    writer.write(bytes(8 << 20))
    async with asyncio.timeout(1):
        await hang_up(writer)
        await asyncio.sleep(0.01)
        assert writer.get_extra_info("socket").fileno() == -1
    mute.transport.abort()
    server.close()
