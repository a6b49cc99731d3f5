"""This peer's place in the DHT: what it says about itself there, and whom it finds.

Owns: the record and its refreshing, the periodic look-up of every stage, and the goodbye. The DHT is slow
discovery: it tells who hosts what and where, also when the coordinator is away. Must not know: rounds;
who works now is in the commits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import structlog

from peer.link import Link
from protocol.errors import SwarmError
from protocol.ids import StageId
from protocol.records import MAX_WAVE, REFRESH_EVERY_S, HostedStage, ReplicaRecord
from protocol.signing import Signed
from protocol.wire import PROTOCOL_VERSION

log = structlog.get_logger()

FIRST_LOOK_S = 3.0
LOOK_EVERY_S = 15.0
INTRODUCE_S = 15.0


class Presence:
    """Publishes one peer's record and watches those of others."""

    def __init__(
        self,
        link: Link,
        *,
        name: str,
        software: str,
        admission: Callable[[], Signed],
        num_stages: int,
        hosted: Callable[[], tuple[HostedStage, ...]],
        load_s: Callable[[], float],
        wave: Callable[[], int],
        on_found: Callable[[Mapping[StageId, Sequence[ReplicaRecord]]], None],
    ) -> None:
        """`hosted` says what is ready to work here, and `wave` how many microbatches pass it together.

        `on_found` gets the records of all stages that could be read, after every look-up.
        """
        self._link = link
        self._name = name
        self._software = software
        self._admission = admission
        self._num_stages = num_stages
        self._hosted = hosted
        self._load_s = load_s
        self._wave = wave
        self._on_found = on_found

    async def keep_published(self) -> None:
        """Refresh our record until cancelled, from the moment there is something to say."""
        while True:
            hosted = self._hosted()
            if hosted:
                try:
                    await self._link.node.publish(await self._record(hosted))
                except SwarmError as error:
                    log.info("record.unpublished", error=error.one_line())
            await asyncio.sleep(REFRESH_EVERY_S if hosted else FIRST_LOOK_S)

    async def keep_looking(self) -> None:
        """Look all stages up until cancelled; introduce who is found."""
        await asyncio.sleep(FIRST_LOOK_S)
        while True:
            found: dict[StageId, Sequence[ReplicaRecord]] = {}
            for stage in map(StageId, range(self._num_stages)):
                try:
                    found[stage] = await self._link.node.replicas(stage)
                except SwarmError as error:
                    log.debug("record.unread", stage=stage, error=error.one_line())
            self._on_found(found)
            await self._introduce(chain.from_iterable(found.values()))
            await asyncio.sleep(LOOK_EVERY_S)

    async def _introduce(self, records: Iterable[ReplicaRecord]) -> None:
        """Dial all at the same time, for a while: many may be out of reach, each at many addresses."""
        introducing = [self._link.introduce(record.peer, record.addresses) for record in records]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(INTRODUCE_S):
                await asyncio.gather(*introducing)

    async def withdraw(self) -> None:
        """Say goodbye; the record would expire anyway."""
        try:
            await self._link.node.withdraw(timeout_s=3.0)
        except SwarmError as error:
            log.debug("record.left", error=error.one_line())

    async def _record(self, hosted: tuple[HostedStage, ...]) -> ReplicaRecord:
        return ReplicaRecord(
            run=self._link.node.run,
            peer=self._link.peer_id,
            name=self._name,
            addresses=await self._link.node.addresses(),
            hosted=hosted,
            software=self._software,
            protocol=PROTOCOL_VERSION,
            admission=self._admission(),
            load_s=min(1e6, self._load_s()),
            wave=min(MAX_WAVE, self._wave()),
        )
