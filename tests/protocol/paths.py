"""Signed paths for tests: honest ones, and with one entry changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from protocol.batches import TaskKind
from protocol.hops import ENTRY_CONTEXT, PathEntry, path_digest
from protocol.ids import RoundId, RunId, StageId, Version, digest
from protocol.signing import Signed, SigningKey, seal

KEYS = tuple(SigningKey(bytes([number]) * 32) for number in range(1, 4))
SPANS = ((0,), (1, 2), (3,))
RUN = RunId("ab" * 16)


def sign_path(
    changes: Sequence[dict[str, Any]] = ({}, {}, {}),
    *,
    keys: Sequence[SigningKey] = KEYS,
    spans: Sequence[tuple[int, ...]] = SPANS,
    **common: Any,
) -> tuple[Signed, ...]:
    """Sign a path, one key and span after the other; `changes` are made to single entries before they are signed."""
    path: tuple[Signed, ...] = ()
    callers = [keys[0], *keys]
    for key, caller, span, change in reversed(list(zip(keys, callers, spans, changes, strict=False))):
        entry = PathEntry(
            run=RUN,
            kind=TaskKind.TRAIN,
            round=RoundId(4),
            number=2,
            stages=tuple(StageId(stage) for stage in span),
            peer=key.peer_id,
            caller=caller.peer_id,
            version=Version(4),
            local_step=0,
            input_digest=digest(b"in"),
            output_digest=digest(b"out"),
            behind=path_digest(path),
            loss_sum=1.5,
            target_tokens=64,
        )
        path = (seal(key, ENTRY_CONTEXT, entry.model_copy(update={**common, **change})), *path)
    return path
