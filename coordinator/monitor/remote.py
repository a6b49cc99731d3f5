"""Reading what a coordinator answers to who asks for the status.

Owns: the envelope's schema. Must not know: how the status is shown.
"""

from __future__ import annotations

import json
from typing import Any

from coordinator.status import SCHEMA
from protocol.control import StatusAnswer
from protocol.errors import IncompatibleError
from protocol.invite import Invite
from protocol.transport.asking import ask_status


async def remote_status(invite: Invite) -> dict[str, Any]:
    """Return the status document of the invite's run.

    Raises `UnreachableError` if the coordinator is not there, or is not the one that the invite names.
    """
    return read_answer(await ask_status(invite))


def read_answer(answer: StatusAnswer) -> dict[str, Any]:
    """Return the document in an answer, or raise `IncompatibleError` if it is of another schema."""
    try:
        envelope = json.loads(answer.document)
        schema, data = envelope["schema"], envelope["data"]
    except (ValueError, KeyError, TypeError):
        raise IncompatibleError("the coordinator's status cannot be read.") from None
    if schema != SCHEMA or not isinstance(data, dict):
        raise IncompatibleError(f"the coordinator answers with {schema!r:.60}, this command reads {SCHEMA}.")
    return data
