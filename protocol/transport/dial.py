"""Opening one libp2p stream through p2pd (hivemind's `stream_open`, minus its leak), and ending one for good.

Owns: the request to the daemon, closing its socket when it says no, and the errors that this can end in. Must
not know: what travels on the stream; our framed streams and hivemind's protobuf streams both start and end here.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress

from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2

from protocol.errors import DeadlineError, UnreachableError

OPEN_TIMEOUT_S = 10.0
LAST_WORD_S = 1.0  # how long a message that ends a talk gets to arrive: closing may destroy what is under way

# one line of libp2p's list, such as "  * [/ip4/203.0.113.5/tcp/4001] dial tcp4 203.0.113.5:4001: i/o timeout"
_ATTEMPT = re.compile(r"^\s*\* \[(\S+)\] (.*)$", re.MULTILINE)


async def dial(
    p2p: P2P, peer: PeerID, name: str, *, timeout_s: float = OPEN_TIMEOUT_S
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a stream to `peer`'s handler `name`.

    Raises `UnreachableError` if the peer or its handler is not there, `DeadlineError` if it takes too long.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _open(p2p, peer, name)
    except TimeoutError:
        raise DeadlineError(f"{peer} did not answer within {timeout_s:g} s") from None
    except (P2PDaemonError, OSError, EOFError) as error:
        said = str(error) or type(error).__name__
        raise UnreachableError(
            f"{peer} cannot be reached: {said.splitlines()[0][:200]}",
            is_certain=is_refused(said),
            is_deaf="protocols not supported" in said,
        ) from None


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close a stream: what is still to be sent gets a moment to go out, and then the socket is gone.

    `writer.close()` alone would wait for ever for a peer that does not read.
    """
    writer.close()
    try:
        with suppress(OSError, RuntimeError):  # the first is also a timeout, the second uvloop's word for "closed"
            async with asyncio.timeout(LAST_WORD_S):
                await writer.wait_closed()
    finally:
        writer.transport.abort()


def is_refused(said: str) -> bool:
    """Tell whether the peer's own machine refused the connection at every address: its process is gone.

    `said` is libp2p's list of what became of each. One refusal is not enough: the peer's loopback address leads to our
    own machine, and its private ones into our own network, where anybody may refuse. So when our line is down those
    refuse while the others are not reached; a peer that has no others is one of our own network. What happens at a
    relay says nothing of the peer behind it.
    """
    attempts = _ATTEMPT.findall(said)
    if not attempts or "... skipping" in said:  # libp2p leaves out what would be too long
        return False
    return all(
        outcome.endswith("connection refused") and "/p2p-circuit" not in address for address, outcome in attempts
    )


async def _open(p2p: P2P, peer: PeerID, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await p2p._client.control.daemon_connector.open_connection()
    try:
        request = p2pd_pb2.StreamOpenRequest(peer=peer.to_bytes(), proto=[name])
        await write_pbmsg(writer, p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=request))
        response = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, response)
        raise_if_failed(response)
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer
