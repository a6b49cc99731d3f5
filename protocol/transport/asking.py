"""Asking a coordinator for the status with a throw-away identity: nothing is joined, nothing is kept.

Owns: the short-lived p2pd, the one call, and reading the answer. Must not know: what the status says, or how it is
shown.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from protocol.control import STATUS_SCHEMA, StatusAnswer, StatusRequest
from protocol.errors import IncompatibleError
from protocol.invite import Invite
from protocol.transport import identity
from protocol.transport.calls import Calls
from protocol.transport.daemon import STOP_TIMEOUT_S, Daemon
from protocol.transport.streams import Streams

LISTEN = ("/ip4/127.0.0.1/tcp/0",)  # p2pd wants to listen somewhere; nobody needs to reach us


async def ask_status(invite: Invite) -> dict[str, Any]:
    """Return the status document of the invite's run.

    Raises `UnreachableError` if the coordinator is not there, or is not the one that the invite names.
    """
    with tempfile.TemporaryDirectory(prefix="handcar-status-") as folder:
        key_path = Path(folder) / "identity.key"
        identity.create(key_path)
        daemon = await Daemon.launch(key_path, host_maddrs=LISTEN, initial_peers=invite.addresses)
        try:
            calls = Calls(Streams(daemon), run=invite.run, coordinator=invite.coordinator)
            answer = await calls.call(invite.coordinator, StatusRequest(), StatusAnswer)
        finally:
            await daemon.stop(timeout_s=STOP_TIMEOUT_S)
    return read_answer(answer)


def read_answer(answer: StatusAnswer) -> dict[str, Any]:
    """Return the document in an answer, or raise `IncompatibleError` if it is of another schema."""
    try:
        envelope = json.loads(answer.document)
        schema, data = envelope["schema"], envelope["data"]
    except (ValueError, KeyError, TypeError):
        raise IncompatibleError("the coordinator's status cannot be read.") from None
    if schema != STATUS_SCHEMA or not isinstance(data, dict):
        raise IncompatibleError(f"the coordinator answers with {schema!r:.60}, this command reads {STATUS_SCHEMA}.")
    return data
