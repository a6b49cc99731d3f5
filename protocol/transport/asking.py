"""Asking a coordinator for the status with a throw-away identity: nothing is joined, nothing is kept.

Owns: the short-lived p2pd and the one call. Must not know: what the status says, or how it is shown.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from protocol.control import StatusAnswer, StatusRequest
from protocol.invite import Invite
from protocol.transport import identity
from protocol.transport.calls import Calls
from protocol.transport.daemon import STOP_TIMEOUT_S, Daemon
from protocol.transport.streams import Streams

LISTEN = ("/ip4/127.0.0.1/tcp/0",)  # p2pd wants to listen somewhere; nobody needs to reach us


async def ask_status(invite: Invite) -> StatusAnswer:
    """Return what the coordinator of the invite's run answers.

    Raises `UnreachableError` if the coordinator is not there, or is not the one that the invite names.
    """
    with tempfile.TemporaryDirectory(prefix="handcar-status-") as folder:
        key_path = Path(folder) / "identity.key"
        identity.create(key_path)
        daemon = await Daemon.launch(key_path, host_maddrs=LISTEN, initial_peers=invite.addresses)
        try:
            calls = Calls(Streams(daemon), run=invite.run, coordinator=invite.coordinator)
            return await calls.call(invite.coordinator, StatusRequest(), StatusAnswer)
        finally:
            await daemon.stop(timeout_s=STOP_TIMEOUT_S)
