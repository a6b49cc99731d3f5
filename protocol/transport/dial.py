"""Opening one libp2p stream through p2pd: hivemind's `stream_open`, minus its leak.

Owns: the request to the daemon, closing its socket when it says no, and the errors that this can end in. Must
not know: what travels on the stream; our framed streams and hivemind's protobuf streams both start here.
"""

from __future__ import annotations

import asyncio

from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2

from protocol.errors import DeadlineError, UnreachableError

OPEN_TIMEOUT_S = 10.0


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
            is_certain=_is_refused(said),
            is_deaf="protocols not supported" in said,
        ) from None


async def _open(p2p: P2P, peer: PeerID, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await p2p._client.control.daemon_connector.open_connection()
    try:
        request = p2pd_pb2.StreamOpenRequest(peer=peer.to_bytes(), proto=[name])
        await write_pbmsg(writer, p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=request))
        response = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, response)
        raise_if_failed(response)
    except BaseException:
        writer.close()
        raise
    return reader, writer


def _is_refused(reason: str) -> bool:
    """Tell whether the peer's own machine refused the connection at every address: its process is gone."""
    return "connection refused" in reason and "timeout" not in reason and "backoff" not in reason
