"""Audits that this peer carries out: it recomputes what another replica of its stages did.

Owns: the orders that are under way, fetching their inputs from the neighbours of the audited, and the answers. Must not
know: what follows from an answer (the coordinator does), tensors (`peer/engine/recompute.py` does).

One at a time, after everything else that waits for the compute thread. An order comes with every beat until it is
answered, and is carried out once.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import structlog

from peer.contributions import Contributions
from peer.data.source import BatchSource
from peer.link import Link
from peer.payloads import Payloads
from peer.pipeline.compute import ComputeThread, Priority
from peer.pipeline.gate import Gate
from peer.reports import ReportQueue
from peer.tasks import TaskId
from protocol.audits import (
    AuditOrder,
    AuditOutcome,
    AuditReport,
    Order,
    Payload,
    ShareOrder,
    ShareReport,
    SketchOrder,
    SketchReport,
    SumOrder,
    Work,
    payload_name,
)
from protocol.batches import TaskKind
from protocol.errors import PeerFault, SwarmError, TransientError
from protocol.ids import PeerId, StageId, Version, digest
from protocol.receipts import shortened

if TYPE_CHECKING:
    from peer.engine.recompute import Recomputer, Source

log = structlog.get_logger()

MAX_WAITING = 64
MAX_REMEMBERED = 4096
FETCH_S = 20.0


class _Withheld(Exception):
    """Somebody does not bring what it vouched for."""

    def __init__(self, holder: PeerId) -> None:
        super().__init__(holder)
        self.holder = holder


class Auditor:
    """Carries out what the coordinator orders."""

    def __init__(
        self,
        *,
        link: Link,
        compute: ComputeThread,
        recomputer: Recomputer,
        payloads: Payloads,
        contributions: Contributions,
        batches: BatchSource,
        gate: Gate,
        reports: ReportQueue,
        stages: tuple[StageId, ...],
        num_stages: int,
        max_body_bytes: int,
        renew: Callable[[Sequence[StageId]], Awaitable[None]] | None = None,
    ) -> None:
        """`renew` gets the weights of stages anew, for orders that want that."""
        self._link, self._compute, self._recomputer = link, compute, recomputer
        self._contributions = contributions
        self._payloads, self._batches, self._gate, self._reports = payloads, batches, gate, reports
        self._stages, self._num_stages, self._max_body_bytes = stages, num_stages, max_body_bytes
        self._waiting: asyncio.Queue[Order] = asyncio.Queue(MAX_WAITING)
        self._known: OrderedDict[int, None] = OrderedDict()
        self._wanted: set[int] = set()
        """Orders of the latest beat: what is not asked for any more need not be done."""
        self._renew = renew
        self.num_recomputed = 0
        """Microbatches and contributions."""

    def take(self, orders: Iterable[Order]) -> None:
        """Take orders that are not known yet, as many as may wait; the others come again."""
        orders = list(orders)
        self._wanted = {order.order for order in orders}
        for order in orders:
            if order.order in self._known or self._waiting.full():
                continue
            self._known[order.order] = None
            while len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
            self._waiting.put_nowait(order)

    async def run(self) -> None:
        """Carry out orders until cancelled."""
        while True:
            order = await self._waiting.get()
            if order.order in self._wanted:
                report = await self.carry_out(order)
                self._reports.add(report)
                self.num_recomputed += isinstance(report, AuditReport) and report.outcome is AuditOutcome.DONE

    async def carry_out(self, order: Order) -> AuditReport | SketchReport | ShareReport:
        """Do what is ordered, and return what we say to it."""
        if isinstance(order, ShareOrder):
            return self._contributions.answer(order)
        if isinstance(order, SketchOrder):
            return SketchReport(order=order.order, sketch=await self._sketch(order))
        return await self._recomputed(order)

    async def _sketch(self, order: SketchOrder) -> bytes:
        data = self._payloads.find(order.digest)
        if data is None:
            return b""
        return await self._sketch_bytes(data, order.seed, is_gradient=order.is_gradient)

    async def _sketch_bytes(
        self, data: bytes | bytearray, seed: bytes, *, is_gradient: bool, prefix: int | None = None
    ) -> bytes:
        try:
            return await asyncio.to_thread(
                self._recomputer.sketch_bytes, data, seed, is_gradient=is_gradient, prefix=prefix
            )
        except SwarmError as error:  # it went over our hop, and is nothing: an empty sketch says so
            log.warning("audit.unreadable", error=error.one_line())
            return b""

    async def _recomputed(self, order: AuditOrder | SumOrder) -> AuditReport:
        if order.is_fresh and self._renew is not None:
            await self._renew(_stages_of(order))
        places = self._places(order)
        if places is None:
            return AuditReport(order=order.order, outcome=AuditOutcome.STALE)
        try:
            if isinstance(order, SumOrder):
                return await self._add_up(order, places)
            return await self._recompute(order, places)
        except _Withheld as error:
            return AuditReport(order=order.order, outcome=AuditOutcome.MISSING, missing=error.holder)
        except SwarmError as error:
            log.warning("audit.failed", round=order.round, order=order.order, error=error.one_line())
            return AuditReport(order=order.order, outcome=AuditOutcome.FAILED)

    def _places(self, order: AuditOrder | SumOrder) -> tuple[tuple[StageId, Version], ...] | None:
        """Return the stages and versions that an order means, or None if they are not ours to know."""
        stages = _stages_of(order)
        began = [self._gate.version_at(stage, order.round) for stage in stages]
        if not set(stages) <= set(self._stages) or None in began:
            return None
        versions = [Version(each) for each in began if each is not None]
        if order.version is not None and order.version != versions[0]:
            if len(versions) > 1:  # a new version came in the middle of the round, and for each stage at another moment
                return None
            versions = [order.version]
        return tuple(zip(stages, versions, strict=True))

    async def _recompute(self, order: AuditOrder, places: tuple[tuple[StageId, Version], ...]) -> AuditReport:
        source, target = await self._sources(order, order, with_target=order.prefix is None)
        seen = [
            b""
            if named is None
            else await self._sketch_bytes(await self._fetch(named), order.seed, is_gradient=back, prefix=order.prefix)
            for named, back in ((order.outputs, False), (order.returned, True))
        ]
        found = await self._compute.run(
            lambda: self._recomputer.recompute(places, source, target, order.seed, prefix=order.prefix),
            priority=Priority.AUDIT,
        )
        if found is None:
            return AuditReport(order=order.order, outcome=AuditOutcome.STALE)
        return AuditReport(
            order=order.order,
            outcome=AuditOutcome.DONE,
            outputs=found.outputs,
            returned=found.returned,
            seen_outputs=seen[0],
            seen_returned=seen[1],
        )

    async def _add_up(self, order: SumOrder, places: tuple[tuple[StageId, Version], ...]) -> AuditReport:
        total = await self._compute.run(lambda: self._recomputer.sum_of(places, order.stage), priority=Priority.AUDIT)
        if total is None:
            return AuditReport(order=order.order, outcome=AuditOutcome.STALE)
        for work in order.works:
            source, target = await self._sources(order, work)
            await self._compute.run(partial(total.add, source, target), priority=Priority.AUDIT)
        found = await self._compute.run(lambda: total.sketch(order.seed), priority=Priority.AUDIT)
        return AuditReport(order=order.order, outcome=AuditOutcome.DONE, outputs=found)

    async def _sources(
        self, order: AuditOrder | SumOrder, work: AuditOrder | Work, *, with_target: bool = True
    ) -> tuple[Source, Source]:
        """Bring what a microbatch enters and leaves the stages with; the latter is empty if nothing goes back."""
        task = TaskId(TaskKind.TRAIN, order.round, work.number)
        is_last = order.first_stage + order.num_stages == self._num_stages
        if (work.inputs is None) != (order.first_stage == 0) or (work.gradient is None) != is_last:
            raise PeerFault("an audit of stages that need other inputs")
        source = await self._source(work.inputs, lambda: self._batches.inputs(task))
        if not with_target:
            return source, b""
        target = await self._source(work.gradient, lambda: self._batches.labels(task))
        return source, target

    async def _source(self, named: Payload | None, own: Callable[[], object]) -> Source:
        return await self._fetch(named) if named is not None else await own()  # type: ignore[misc]

    async def _fetch(self, named: Payload) -> bytes | bytearray:
        """Bring bytes from who holds them. Raises `_Withheld` if they do not come, or are others."""
        if named.holder == self._link.peer_id:
            data = self._payloads.find(named.digest)
        else:
            try:
                async with asyncio.timeout(FETCH_S):
                    data = await self._link.blobs.fetch(
                        named.holder, payload_name(named.digest), max_bytes=self._max_body_bytes
                    )
            except (TransientError, PeerFault, TimeoutError) as error:
                log.info("audit.withheld", peer=named.holder, error=str(error))
                data = None
        if data is None or shortened(digest(memoryview(data))) != named.digest:
            raise _Withheld(named.holder)
        return data


def _stages_of(order: AuditOrder | SumOrder) -> tuple[StageId, ...]:
    return tuple(StageId(order.first_stage + index) for index in range(order.num_stages))
