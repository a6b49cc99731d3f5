"""The check of fetched history as a peer has it: the round machine's own rules, for tests that play everything else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from protocol.ids import PeerId, RunId, StageId
from protocol.rounds.lineage import Chain
from protocol.rounds.messages import Seat
from protocol.rounds.settings import KeyNotary, RoundRules, RoundSize, RoundTimers, Settings
from protocol.signing import Signed, SigningKey

STAGE = StageId(1)
RUN = RunId("ab" * 16)


def check_of(me: PeerId, key: SigningKey, *, coordinator: SigningKey) -> Callable[[Signed, tuple[Signed, ...]], Chain]:
    """Return the check of a member of `STAGE` in `RUN`, who signs with `key`."""
    settings = Settings(
        run=RUN,
        stage=STAGE,
        me=Seat(peer=me, session=1),
        coordinator=coordinator.peer_id,
        timers=RoundTimers(),
        rules=RoundRules(size_of=lambda _: RoundSize(1)),
        notary=KeyNotary(key),
    )
    return partial(Chain.of_history, settings)
