"""Orders of audits at a peer: what is fetched from whom, what is answered, and that each is carried out once.

The network and the tensors are played. Oracles: reports, and who was asked for what.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peer.auditor import Auditor
from peer.payloads import Payloads
from peer.pipeline.gate import Gate
from protocol.audits import (
    AuditOrder,
    AuditOutcome,
    AuditReport,
    Order,
    Payload,
    SketchOrder,
    SketchReport,
    payload_name,
)
from protocol.errors import LocalFault, UnreachableError
from protocol.ids import Lineage, PeerId, RoundId, RunId, StageId, Version, digest
from protocol.receipts import shortened

ME, UP, DOWN = PeerId("me"), PeerId("up"), PeerId("down")
SEED = b"s" * 32
X, G = b"activations", b"gradient"


def payload(holder: PeerId, data: bytes) -> Payload:
    return Payload(holder=holder, digest=shortened(digest(data)))


def order(number: int = 1, **changes: Any) -> AuditOrder:
    fields: dict[str, Any] = {
        "order": number,
        "round": RoundId(3),
        "number": 7,
        "first_stage": StageId(1),
        "num_stages": 1,
        "version": None,
        "seed": SEED,
        "inputs": payload(UP, X),
        "gradient": payload(DOWN, G),
    }
    return AuditOrder(**(fields | changes))


class Case:
    def __init__(self) -> None:
        self.held: dict[PeerId, dict[str, bytes]] = {
            UP: {payload_name(shortened(digest(X))): X},
            DOWN: {payload_name(shortened(digest(G))): G},
        }
        self.reports: list[AuditReport | SketchReport] = []
        self.recomputed: list[tuple[Any, Any, Any]] = []
        self.prefixes: list[int | None] = []
        self.answer: Any = SimpleNamespace(outputs=b"o", returned=b"r")
        self.payloads = Payloads(max_bytes=1000)
        self.gate = Gate(run=RunId("r"))
        self.gate.open(StageId(1), round_id=RoundId(3), version=Version(5), lineage=Lineage(bytes(32)))
        self.auditor = Auditor(
            link=cast(Any, SimpleNamespace(peer_id=ME, blobs=SimpleNamespace(fetch=self._fetch))),
            compute=cast(Any, SimpleNamespace(run=self._run)),
            recomputer=cast(Any, SimpleNamespace(recompute=self._recompute, sketch_bytes=self._sketch)),
            payloads=self.payloads,
            contributions=cast(Any, None),
            batches=cast(Any, None),
            gate=self.gate,
            reports=cast(Any, SimpleNamespace(add=self.reports.append)),
            stages=(StageId(1),),
            num_stages=3,
            max_body_bytes=1000,
        )

    async def said(self, *orders: Order) -> list[AuditReport | SketchReport]:
        """Give orders, and wait until they are answered."""
        self.auditor.take(orders)
        task = asyncio.create_task(self.auditor.run())
        for _ in range(200):
            if len(self.reports) >= len({each.order for each in orders}):
                break
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return self.reports

    async def _fetch(self, peer: PeerId, name: str, *, max_bytes: int) -> bytes:
        assert max_bytes == 1000
        if name not in self.held.get(peer, {}):
            raise UnreachableError("not here")
        return self.held[peer][name]

    async def _run(self, work: Callable[[], Any], *, priority: object) -> Any:
        return work()

    def _recompute(self, places: Any, source: Any, target: Any, seed: bytes, *, prefix: int | None) -> Any:
        assert seed == SEED
        self.prefixes.append(prefix)
        self.recomputed.append((places, source, target))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def _sketch(self, data: bytes, seed: bytes, *, is_gradient: bool, prefix: int | None) -> bytes:
        return bytes([is_gradient]) + data[:prefix]


@asynccontextmanager
async def opened() -> AsyncIterator[Case]:
    yield Case()


async def test_inputs_come_from_the_neighbours_and_only_a_second_witness_sees_the_result() -> None:
    async with opened() as case:
        (report,) = await case.said(order())
        assert report == AuditReport(order=1, outcome=AuditOutcome.DONE, outputs=b"o", returned=b"r")
        assert case.recomputed == [(((1, 5),), X, G)]
    async with opened() as case:
        for holder, data in ((DOWN, b"y"), (UP, b"dx")):
            case.held[holder][payload_name(shortened(digest(data)))] = data
        (report,) = await case.said(order(outputs=payload(DOWN, b"y"), returned=payload(UP, b"dx")))
        assert isinstance(report, AuditReport)
        assert (report.seen_outputs, report.seen_returned) == (b"\0y", b"\1dx")


async def test_of_a_prefix_nothing_is_fetched_but_what_goes_in_and_out_forward() -> None:
    """Oracle: nobody has the gradient, and it is not missed."""
    async with opened() as case:
        del case.held[DOWN][payload_name(shortened(digest(G)))]
        case.held[DOWN][payload_name(shortened(digest(b"yz")))] = b"yz"
        case.answer = SimpleNamespace(outputs=b"o", returned=b"")
        (report,) = await case.said(order(outputs=payload(DOWN, b"yz"), prefix=1))
        assert report == AuditReport(order=1, outcome=AuditOutcome.DONE, outputs=b"o", seen_outputs=b"\0y")
        assert case.prefixes == [1]
        assert case.auditor.num_recomputed == 1


async def test_an_order_that_comes_with_every_beat_is_carried_out_once() -> None:
    async with opened() as case:
        case.auditor.take([order()])
        assert len(await case.said(order(), order())) == 1
        await asyncio.sleep(0.02)
        assert len(case.recomputed) == 1


@pytest.mark.parametrize("others", [None, b"other bytes"])
async def test_who_does_not_bring_what_it_vouched_for_is_named(others: bytes | None) -> None:
    """Nothing at all, or something else under that name."""
    async with opened() as case:
        name = payload_name(shortened(digest(G)))
        if others is None:
            del case.held[DOWN][name]
        else:
            case.held[DOWN][name] = others
        (report,) = await case.said(order())
        assert report == AuditReport(order=1, outcome=AuditOutcome.MISSING, missing=DOWN)
        assert case.recomputed == []


@pytest.mark.parametrize(
    "changes",
    [
        {"round": RoundId(2)},
        {"first_stage": StageId(0), "inputs": None},
        {"num_stages": 2, "gradient": None},
    ],
)
async def test_a_round_or_stages_that_are_not_ours_to_know_are_stale(changes: dict[str, Any]) -> None:
    async with opened() as case:
        (report,) = await case.said(order(**changes))
        assert report == AuditReport(order=1, outcome=AuditOutcome.STALE)


async def test_weights_that_are_gone_are_stale_and_a_machine_that_cannot_compute_says_so() -> None:
    async with opened() as case:
        case.answer = None
        (report,) = await case.said(order())
        assert report == AuditReport(order=1, outcome=AuditOutcome.STALE)
    async with opened() as case:
        case.answer = LocalFault("out of memory.")
        (report,) = await case.said(order())
        assert report == AuditReport(order=1, outcome=AuditOutcome.FAILED)


async def test_a_version_that_came_in_the_middle_of_the_round_is_the_one_that_is_meant() -> None:
    async with opened() as case:
        await case.said(order(version=Version(6)))
        assert case.recomputed[0][0] == ((1, 6),)


async def test_a_sketch_is_of_what_we_hold_and_empty_if_we_do_not() -> None:
    async with opened() as case:
        case.payloads.keep(digest(X), X)
        orders = [
            SketchOrder(order=number, digest=shortened(digest(data)), is_gradient=False, seed=SEED)
            for number, data in ((1, X), (2, G))
        ]
        assert await case.said(*orders) == [SketchReport(order=1, sketch=b"\0" + X), SketchReport(order=2, sketch=b"")]
