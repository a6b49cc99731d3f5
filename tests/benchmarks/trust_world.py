"""A small swarm in one process, with the real engines, receipts, audits, averages and credits, and no network.

Three stages of four replicas train a model of 197k parameters on Python's own sources, byte by byte. Every replica is a
`SpanEngine`; bodies of hops and contributions are encoded by the real codecs, both ends of a hop keep what crossed it
and sign windows over it, and a whole coordinator (SQLite, registry, audits, bans, credits) hears of all that by beats.
Audits of a round are carried out while the next one is worked on, before its contributions are averaged.

Owns: who does what in which order, and the counts of what came of it. Must not know: in which ways peers cheat
(`trust_cheats.py`), rows (`trust_attacks.py`). Two things are played: calls are Python calls, and time passes when we
say so.
"""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

from coordinator.store.database import Connection
from peer.auditor import Auditor
from peer.averaging.absorb import Update, absorb, update_norm
from peer.averaging.merge import OrderedMerger, check_summable, squares
from peer.averaging.parts import cut, spans_of
from peer.averaging.reduce import contribution
from peer.averaging.taken import Taken
from peer.codecs import codec
from peer.contributions import Contributions
from peer.engine.local_steps import LocalRules
from peer.engine.optimizer import OptimizerSpec
from peer.engine.outer import OuterSpec
from peer.engine.recompute import Recomputer
from peer.engine.schedule import clip_threshold, learning_rate
from peer.engine.span import SpanEngine
from peer.engine.stage_engine import StageEngine
from peer.engine.weights import PastWeights
from peer.payloads import Payloads
from peer.pipeline.gate import Gate
from peer.tasks import TaskId
from protocol.audits import (
    AuditOrder,
    AuditReport,
    NonsenseReport,
    Order,
    ShareOrder,
    ShareReport,
    SketchOrder,
    SketchReport,
    SumOrder,
    contribution_seed,
)
from protocol.control import ReceiptReport, Report
from protocol.errors import PeerFault, UnreachableError, WireError
from protocol.hops import MAX_BODY_BYTES
from protocol.ids import PeerId, RoundId, StageId, digest
from protocol.receipts import Hop, draw_windows, shortened
from protocol.rounds.factors import factors_of
from protocol.rounds.lineage import next_lineage
from protocol.rounds.messages import Commit, Contribution, Credit
from protocol.rounds.records import clip_scale
from protocol.signing import Signed
from tests.benchmarks.trust_model import (
    CONFIG,
    FP32,
    HELDOUT_BATCHES,
    LAST,
    LENGTH,
    MICROBATCHES,
    REPLICAS,
    SEQUENCES,
    SHAPE,
    STAGES,
    TOKENS,
    HopCodec,
    Machine,
    Source,
    make_manifest,
    windows,
)
from tests.coordinator.office import (
    NO_LINEAGE,
    Office,
    StoppedTime,
    Volunteer,
    closing,
    closing_report,
    commit,
    open_office,
    sign_closing,
    state,
)

if TYPE_CHECKING:
    from tests.benchmarks.trust_cheats import Cheat


BEAT_S = 5.0
BEATS_PER_ROUND = 6  # orders with one, answers with the next, and twice over for a second opinion
PAST_BYTES = 1 << 26
PAYLOAD_BYTES = 1 << 26
MEMORY = Path("/dev/shm")  # SQLite waits for the disk at every transaction, and here nothing has to outlive anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One training."""

    seed: int = 0
    rounds: int = 60
    mode: str = "gradient"
    codec: HopCodec = "fp16"
    """Of activations and their gradients."""
    microbatches: int = MICROBATCHES
    """Of a round."""
    machines: Sequence[Machine] = (FP32,)
    """Replica number i of every stage has one of them in turn."""
    is_defended: bool = True
    cheats: Mapping[tuple[int, int], Callable[[], Cheat]] = field(default_factory=dict)
    """By stage and number of the replica."""


@dataclass(frozen=True, slots=True)
class Task:
    """One microbatch in one round."""

    round: RoundId
    number: int


PART_ELEMENTS = 8_192


class Showing:
    """A stage as it is shown to who sketches contributions: a cheat may show another one than it gave."""

    def __init__(self, engine: StageEngine) -> None:
        self._engine = engine
        self.shown: Sequence[Tensor] = ()
        self.has_contribution = True

    def contribution_shard(self, number: int) -> Tensor:
        return self.shown[number]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@dataclass(slots=True, kw_only=True)
class Member:
    """One replica of one stage, and what is counted of it."""

    volunteer: Volunteer
    stage: StageId
    machine: Machine
    span: SpanEngine
    gate: Gate
    recomputer: Recomputer
    auditor: Auditor
    payloads: Payloads
    contributions: Contributions
    showing: Showing
    cheat: Cheat | None
    outbox: list[Report]
    sent: list[Hop] = field(default_factory=list)
    served: list[Hop] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    answered: set[int] = field(default_factory=set)
    sequence: int = 0
    is_out: bool = False
    tasks: int = 0
    tasks_when_out: int | None = None
    bad: Counter[RoundId] = field(default_factory=Counter)
    """Tasks of each round that it did wrong and that went through."""
    refused: int = 0
    """Tasks that failed because what it brought was refused."""
    audits: int = 0
    """How often it was audited."""
    lies: int = 0
    """Answers about others that were not true."""

    @property
    def peer(self) -> PeerId:
        return self.volunteer.peer

    @property
    def engine(self) -> StageEngine:
        return self.span.engines[self.stage]


class Refused(Exception):
    """The callee refuses a body: its caller cannot go on."""


class Failed(Exception):
    """A microbatch came to nothing at a peer; somebody else is asked."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a callee answers."""

    gradient: bytes
    is_steady: bool
    path: tuple[Member, ...]


@dataclass(slots=True)
class Carried:
    """What a cheat has sent for one microbatch, on and back: its partners know."""

    peer: PeerId
    on: bytes = b""
    back: bytes = b""


@dataclass(slots=True, kw_only=True)
class Result:
    """What a training came to."""

    loss: float
    members: list[Member]
    strikes: dict[PeerId, int]
    out: set[PeerId]
    findings: Counter[tuple[str, bool]]
    """Audits by finding, and whether the audited was honest."""
    paid_tokens: dict[tuple[PeerId, RoundId], int]
    """What was booked and not taken back."""
    largest: tuple[float, float]
    """Distances of honest work that audits have measured: activations, gradients."""
    dropped_contributions: int

    @property
    def cheats(self) -> list[Member]:
        return [member for member in self.members if member.cheat is not None]

    @property
    def honest(self) -> list[Member]:
        return [member for member in self.members if member.cheat is None]

    def honest_struck(self) -> int:
        """Count honest peers that were struck or put out."""
        return sum(bool(self.strikes[member.peer]) or member.peer in self.out for member in self.honest)

    def fake_share(self) -> float:
        """Return which part of the wrong tasks is paid for in the end."""
        fake = paid = 0
        for member in self.cheats:
            for round_id, count in member.bad.items():
                fake += count * TOKENS
                paid += min(count * TOKENS, self.paid_tokens.get((member.peer, round_id), 0))
        return paid / fake if fake else 0.0


def train(setting: Setting) -> Result:
    """Train once. The same setting gives the same result."""
    chance = random.Random(f"secrets/{setting.seed}")
    memory = MEMORY if MEMORY.is_dir() else None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="handcar-bench-", dir=memory) as folder,
            patch("coordinator.audit.office.secrets", SimpleNamespace(token_bytes=chance.randbytes)),
            # stages are smaller than one part: all of a sum would be made by one member
            patch("peer.averaging.parts.PART_ELEMENTS", PART_ELEMENTS),
            patch("protocol.sketch.SEGMENT", PART_ELEMENTS),
        ):
            return asyncio.run(_train(setting, Path(folder)))
    finally:
        torch.set_num_threads(threads)


async def _train(setting: Setting, folder: Path) -> Result:
    run = make_manifest(
        setting.seed, setting.rounds, mode=setting.mode, codec=setting.codec, microbatches=setting.microbatches
    )
    async with open_office(folder, time=StoppedTime(), run=run) as office:
        world = World(setting, office)
        try:
            await world.begin()
            for number in range(setting.rounds):
                await world.round(RoundId(number))
            return await world.finish()
        finally:
            world.close()


class World:
    """The swarm and its coordinator."""

    def __init__(self, setting: Setting, office: Office) -> None:
        self.setting, self.office, self.manifest = setting, office, office.manifest
        self._chance = random.Random(f"world/{setting.seed}")
        self._past = {StageId(stage): PastWeights(max_bytes=PAST_BYTES) for stage in range(STAGES)}
        self.codecs = tuple(codec(name) for name in self.manifest.averaging.hop_codecs)
        self.members = [self._member(StageId(s), number) for s in range(STAGES) for number in range(REPLICAS)]
        self.by_peer = {member.peer: member for member in self.members}
        self._schedule = learning_rate(self.manifest)
        self._clip = {StageId(stage): clip_threshold(self.manifest, StageId(stage)) for stage in range(STAGES)}
        self._dropped = 0
        self._lineages = {StageId(stage): NO_LINEAGE for stage in range(STAGES)}
        self.carried: dict[tuple[RoundId, int, StageId], Carried] = {}
        """What cheats have sent, by round, number and stage."""
        for member in self.members:
            if member.cheat is not None:
                member.cheat.enter(self, member)

    async def begin(self) -> None:
        """Let everybody in."""
        for member in self.members:
            await self.office.join(member.volunteer, wanted_stages=(member.stage,))
            await self.office.beat(member.volunteer, self._state(member))

    async def round(self, round_id: RoundId) -> None:
        """Work on a round while the one before is audited, average it, and hand its receipts in."""
        for member in self._present():
            member.span.open(member.stage, round_id, fresh=True)
            member.gate.open(
                member.stage, round_id=round_id, version=member.engine.version, lineage=self._lineages[member.stage]
            )
        self.carried = {key: each for key, each in self.carried.items() if key[0] >= round_id - 2}
        paths = [self._feed(Task(round_id, number)) for number in range(self.setting.microbatches)]
        await self._audit()
        credits = Counter((member.stage, member.peer) for path in paths for member in path)
        under = self._close(round_id, sum(bool(path) for path in paths), credits)
        for stage in range(STAGES):
            await self._average(StageId(stage), round_id, under, credits)
        self._sign(round_id)

    async def finish(self) -> Result:
        """Let the last audits end, settle, and count."""
        await self._audit()
        await self._audit()
        await self.office.services.credits.settle_rest()
        found, largest, paid = await self.office.services.database.run(self._count)
        standings = {member.peer: self.office.services.audits.standing(member.peer) for member in self.members}
        return Result(
            loss=self._heldout_loss(),
            members=self.members,
            strikes={peer: len(each.strikes) + len(each.faults) for peer, each in standings.items()},
            out={member.peer for member in self.members if member.is_out},
            findings=found,
            paid_tokens=paid,
            largest=largest,
            dropped_contributions=self._dropped,
        )

    def close(self) -> None:
        for member in self.members:
            member.engine.close()

    # -- bodies ---------------------------------------------------------------------------------------

    def decode(self, data: bytes | bytearray, *, is_gradient: bool) -> Tensor:
        """Return what a body holds (B, T, D)."""
        width = CONFIG["hidden_size"]
        return self.codecs[is_gradient].decode(data, TOKENS * width).view(SEQUENCES, LENGTH, width)

    def encode(self, values: Tensor, *, is_gradient: bool) -> bytes:
        """Return a body."""
        return bytes(self.codecs[is_gradient].encode(values.detach().float().reshape(-1).contiguous()))

    def texts(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return inputs and labels (B, T) of a microbatch."""
        return windows(f"{self.setting.seed}/{task.round}/{task.number}", is_heldout=False)

    # -- work -----------------------------------------------------------------------------------------

    def _present(self, stage: int | None = None) -> list[Member]:
        return [each for each in self.members if not each.is_out and stage in (None, each.stage)]

    def _feed(self, task: Task) -> tuple[Member, ...]:
        """Have a microbatch worked on; return through whom it went, nobody if nobody could."""
        inputs = self.texts(task)[0].numpy()
        for feeder in self._candidates(task, StageId(0)):
            try:
                return self._serve(task, feeder, inputs).path
            except Failed:
                continue
        return ()

    def _candidates(self, task: Task, stage: StageId) -> list[Member]:
        """Return the replicas of a stage in the order in which they are asked: each comes first equally often."""
        present = self._present(stage)
        random.Random(f"{self.setting.seed}/{task.round}/{stage}").shuffle(present)
        first = task.number % len(present) if present else 0
        return present[first:] + present[:first]

    def _serve(self, task: Task, member: Member, source: Source) -> Served:
        """Do a microbatch at a member and behind it. Raises `Refused` for a body that is none, `Failed` otherwise."""
        if member.cheat is not None:
            member.cheat.begin(task)
            self.carried[task.round, task.number, member.stage] = Carried(member.peer)
        done = self._finish(task, member, source) if member.stage == LAST else self._go_on(task, member, source)
        member.tasks += 1
        if member.cheat is not None and member.cheat.does(task):
            member.bad[task.round] += 1
        return done

    def _finish(self, task: Task, member: Member, source: Source) -> Served:
        labels = self.texts(task)[1]
        if member.cheat is not None:
            labels = member.cheat.labels(task, labels)
        try:
            with member.machine.computing():
                result = member.span.loss_and_backward(
                    source, SHAPE, labels.numpy(), entry=member.stage, round_id=task.round
                )
        except (PeerFault, WireError):
            raise Refused from None
        assert result.gradient is not None
        gradient = bytes(result.gradient)
        if member.cheat is not None:
            gradient = member.cheat.sends_back(task, source, None, gradient)
            self.carried[task.round, task.number, member.stage].back = gradient
        return Served(gradient, result.standing is not None, (member,))

    def _go_on(self, task: Task, member: Member, source: Source) -> Served:
        try:
            with member.machine.computing():
                sent, shape, ticket = member.span.forward(source, SHAPE, entry=member.stage, round_id=task.round)
        except (PeerFault, WireError):
            raise Refused from None
        body = bytes(sent)
        if member.cheat is not None:
            body = member.cheat.sends_on(task, source, body)
            self.carried[task.round, task.number, member.stage].on = body
        for callee in self._candidates(task, StageId(member.stage + 1)):
            try:
                served = self._serve(task, callee, body)
            except Refused:
                member.refused += 1
                self._complain(callee, member, task)
                break
            except Failed:
                continue
            try:
                with member.machine.computing():
                    back = member.span.backward(ticket, served.gradient, shape, target_tokens=TOKENS)
            except (PeerFault, WireError):
                callee.refused += 1
                self._complain(member, callee, task)
                callee.tasks -= 1
                callee.bad[task.round] -= callee.cheat is not None and callee.cheat.does(task)
                continue
            self._note_hop(task, member, callee, body, served, is_steady=ticket.standing is not None)
            gradient = b"" if back is None else bytes(back)
            if member.cheat is not None and back is not None:
                gradient = member.cheat.sends_back(task, source, served.gradient, gradient)
                self.carried[task.round, task.number, member.stage].back = gradient
            return Served(gradient, ticket.is_steady, (member, *served.path))
        member.span.discard(ticket)
        raise Failed

    def _note_hop(
        self, task: Task, caller: Member, callee: Member, body: bytes, served: Served, *, is_steady: bool
    ) -> None:
        hop = Hop(
            number=task.number,
            caller=caller.peer,
            callee=callee.peer,
            first_stage=callee.stage,
            num_stages=1,
            target_tokens=TOKENS,
            given=shortened(digest(body)),
            returned=shortened(digest(served.gradient)),
            version=callee.engine.version,
            local_step=0 if served.is_steady else 1,
            caller_step=0 if is_steady else 1,
        )
        caller.sent.append(hop)
        callee.served.append(hop)
        for end in (caller, callee):
            for data in (body, served.gradient):
                end.payloads.keep(digest(data), data)

    def _complain(self, witness: Member, about: Member, task: Task) -> None:
        """Tell the coordinator of nonsense, once for each peer and round; whoever sends it says nothing of others."""
        report = NonsenseReport(peer=about.peer, round=task.round)
        if witness.cheat is None and report not in witness.outbox:
            witness.outbox.append(report)

    # -- averages -------------------------------------------------------------------------------------

    async def _average(
        self, stage: StageId, round_id: RoundId, under: Signed, credits: Counter[tuple[StageId, PeerId]]
    ) -> None:
        present = self._present(stage)
        tokens = {member.peer: member.span.freeze(stage) for member in present}
        if self.setting.is_defended:
            self._past[stage].keep(
                stage,
                present[0].engine.version,
                num_elements=present[0].engine.num_elements,
                copy=present[0].engine.shared_weights,
            )
        given: dict[PeerId, list[Tensor]] = {}
        senders = [member for member in present if tokens[member.peer]]
        for member in list(senders):
            shards = [member.engine.contribution_shard(number).clone() for number in range(len(member.engine.shards))]
            if member.cheat is not None:
                shards = [member.cheat.contributes(number, values) for number, values in enumerate(shards)]
                tokens[member.peer] = member.cheat.claims(tokens[member.peer])
            try:
                for values in shards:
                    check_summable(values, num_senders=len(present))
            except WireError:  # its reducers refuse it, and it is left out
                senders.remove(member)
                self._dropped += 1
                continue
            given[member.peer] = shards
        contributors = tuple(
            Contribution(
                peer=member.peer,
                tokens=tokens[member.peer],
                weight=min(tokens[member.peer], TOKENS * credits[stage, member.peer]),
                norm=math.sqrt(sum(squares(values) for values in given[member.peer])),
            )
            for member in senders
        )
        weights = tuple(each.weight for each in contributors)
        if not sum(weights):
            return
        name = self.manifest.averaging.codecs_of(stage)[0]
        if not self.setting.is_defended:  # counted, and not clipped
            contributors = tuple(each.model_copy(update={"norm": 0.0}) for each in contributors)
        factors = factors_of(contributors, is_mean=self.setting.mode == "diloco")
        data = await _reduced(name, [given[member.peer] for member in senders], factors, senders)
        update = Update(name, data, weights, factors=factors)
        try:
            update = replace(update, norm=update_norm(present[0].engine, update))
        except WireError:
            return
        assert update.norm is not None
        message = self._commit(stage, under, senders, contributors, update)
        if self.setting.is_defended:
            self._record(stage, message, senders, given, update)
        for member in present:
            absorb(
                member.engine,
                update,
                clip_scale=clip_scale(update.norm / sum(weights), self._clip[stage]),
                schedule=self._schedule,
                is_ours=member in senders,
            )
        assert len({member.engine.state_digest() for member in present}) == 1, "replicas do not agree"

    def _commit(
        self,
        stage: StageId,
        under: Signed,
        senders: Sequence[Member],
        contributors: tuple[Contribution, ...],
        update: Update,
    ) -> Commit:
        members = [member.volunteer for member in senders]
        said: dict[str, Any] = {"contributors": contributors, "codec": update.codec, "norm": update.norm}
        said["digest"] = digest(bytes(update.data))
        return commit(self.manifest, stage, under, members=members, parent=self._lineages[stage], **said)

    def _record(
        self,
        stage: StageId,
        message: Commit,
        senders: Sequence[Member],
        given: Mapping[PeerId, Sequence[Tensor]],
        update: Update,
    ) -> None:
        """Have everybody sketch what it gave, if this commit is one of those on record."""
        lineage = self._lineages[stage] = next_lineage(self._lineages[stage], message.to_bytes())
        self.office.services.audits.hear_commit(message, lineage)
        if contribution_seed(lineage) is None:
            return
        shards = [given[member.peer] for member in senders]
        for index, member in enumerate(senders):
            taken = _taken(update.codec, shards, maker=index)
            honest = [member.engine.contribution_shard(number) for number in range(len(member.engine.shards))]
            shown = shards[index] if member.cheat is None else member.cheat.shows(shards[index], honest)
            member.showing.shown = shown
            member.contributions.before_step(stage, message, replace(update, taken=taken))

    # -- receipts and audits --------------------------------------------------------------------------

    def _close(self, round_id: RoundId, tasks: int, credits: Counter[tuple[StageId, PeerId]]) -> Signed:
        """End a round: the closing says what was done, by the signed paths."""
        clock = next(member for member in self._present() if member.cheat is None)
        earned = tuple(
            Credit(stage=stage, peer=peer, tokens=count * TOKENS) for (stage, peer), count in sorted(credits.items())
        )
        under = sign_closing(clock.volunteer, closing(self.manifest, round_id, tasks=tasks, credits=earned))
        clock.outbox.insert(0, closing_report(under))
        return under

    def _sign(self, round_id: RoundId) -> None:
        """Sign what everybody says of its hops; that travels with the next beats."""
        for member in self._present():
            sent, served = member.sent, member.served
            if member.cheat is not None:
                sent, served = member.cheat.says(sent, served)
            member.outbox += [
                ReceiptReport(window=window)
                for window in draw_windows(
                    member.volunteer.key,
                    run=self.manifest.run_id,
                    session=member.volunteer.session,
                    round_id=round_id,
                    sent=sent,
                    served=served,
                )
            ]
            member.sent, member.served = [], []

    async def _audit(self) -> None:
        """Let half a minute pass: beats, orders, answers, and what follows from them."""
        services = self.office.services
        for _ in range(BEATS_PER_ROUND):
            self.office.time.advance(BEAT_S)
            for member in self._present():
                if member.outbox or any(services.audits.orders_for(member.peer)):
                    await self._beat(member)
            await services.bans.tick()
            await services.credits.tick()
            if self.setting.is_defended:
                await services.audits.tick()
            self._put_out()
            for member in self._present():
                member.outbox += [await self._answer(member, order) for order in member.orders]
                member.orders = []

    async def _beat(self, member: Member) -> None:
        first, member.sequence = member.sequence + 1, member.sequence + len(member.outbox)
        reports = [(first + index, report) for index, report in enumerate(member.outbox)]
        member.outbox.clear()
        reply = await self.office.beat(member.volunteer, self._state(member), reports=reports)
        orders: list[Order] = [*reply.shares, *reply.audits, *reply.sketches, *reply.sums]
        for order in orders:
            if order.order not in member.answered:
                member.answered.add(order.order)
                member.orders.append(order)

    def _put_out(self) -> None:
        live = {peer.peer for peer in self.office.services.registry.live()}
        for member in self._present():
            if member.peer not in live:
                member.is_out, member.tasks_when_out = True, member.tasks

    async def _answer(self, member: Member, order: Order) -> Report:
        """Carry out an order, and tell what the member tells of it."""
        report = await member.auditor.carry_out(order)
        if member.cheat is None:
            return report
        if isinstance(order, ShareOrder) and isinstance(report, ShareReport):
            return member.cheat.shares(report)
        if isinstance(order, SketchOrder) and isinstance(report, SketchReport):
            return report.model_copy(update={"sketch": member.cheat.sketches(order, report.sketch)})
        assert isinstance(order, AuditOrder | SumOrder)
        assert isinstance(report, AuditReport)
        return member.cheat.reports(order, report)

    def _auditor(
        self,
        peer: PeerId,
        stage: StageId,
        machine: Machine,
        gate: Gate,
        own: Recomputer,
        payloads: Payloads,
        contributions: Contributions,
    ) -> Auditor:
        """Return a peer's real auditor, on a network that is a dictionary."""

        async def fetch(holder: PeerId, name: str, *, max_bytes: int) -> bytes:
            data = self.by_peer[holder].payloads.resolve(name)
            if data is None:
                raise UnreachableError(f"{holder} does not have {name}")
            return bytes(data)

        async def compute(work: Callable[[], Any], *, priority: object) -> Any:
            with machine.computing():
                return work()

        async def text(task: TaskId, which: int) -> Any:
            return self.texts(Task(task.round, task.number))[which].numpy()

        return Auditor(
            link=cast(Any, SimpleNamespace(peer_id=peer, blobs=SimpleNamespace(fetch=fetch))),
            compute=cast(Any, SimpleNamespace(run=compute)),
            recomputer=own,
            payloads=payloads,
            contributions=contributions,
            batches=cast(Any, SimpleNamespace(inputs=partial(text, which=0), labels=partial(text, which=1))),
            gate=gate,
            reports=cast(Any, None),
            stages=(stage,),
            num_stages=STAGES,
            max_body_bytes=MAX_BODY_BYTES,
        )

    # -- beginning and end ----------------------------------------------------------------------------

    def _member(self, stage: StageId, number: int) -> Member:
        averaging = self.manifest.averaging
        is_local = self.setting.mode == "diloco"
        outer = OuterSpec(averaging.outer_learning_rate, averaging.outer_momentum) if is_local else None
        engine = StageEngine.build(
            CONFIG,
            num_stages=STAGES,
            stage=stage,
            optimizer=OptimizerSpec(name="adamw8bit"),
            seed=self.setting.seed,
            keep_budget_bytes=1 << 30,
            outer=outer,
        )
        local = None
        if is_local:
            local = LocalRules(
                every=averaging.microbatches_per_step,
                clip={stage: clip_threshold(self.manifest, stage)},
                schedule=learning_rate(self.manifest),
            )
        there, back = self.codecs
        span = SpanEngine(
            {stage: engine},
            codec=there,
            gradient_codec=back,
            hidden_size=CONFIG["hidden_size"],
            num_stages=STAGES,
            microbatch=(SEQUENCES, LENGTH),
            local=local,
        )
        recomputer = Recomputer(
            CONFIG,
            num_stages=STAGES,
            engines=span.engines,
            past=self._past[stage],
            codec=there,
            gradient_codec=back,
            microbatch=(SEQUENCES, LENGTH),
        )
        made = self.setting.cheats.get((stage, number))
        volunteer = Volunteer(f"peer-{self.setting.seed}-{stage}-{number}")
        machine = self.setting.machines[number % len(self.setting.machines)]
        gate, payloads = Gate(run=self.manifest.run_id), Payloads(max_bytes=PAYLOAD_BYTES)
        showing, outbox = Showing(engine), list[Report]()
        contributions = Contributions(
            me=volunteer.peer,
            engines=cast(Any, {stage: showing}),
            recomputer=cast(Any, SimpleNamespace(keep=lambda stage: None)),  # all replicas here have the same
            gate=cast(Any, SimpleNamespace(opening=lambda stage: True)),
            report=outbox.append,
        )
        return Member(
            volunteer=volunteer,
            stage=stage,
            machine=machine,
            span=span,
            gate=gate,
            recomputer=recomputer,
            auditor=self._auditor(volunteer.peer, stage, machine, gate, recomputer, payloads, contributions),
            contributions=contributions,
            showing=showing,
            outbox=outbox,
            payloads=payloads,
            cheat=None if made is None else made(),
        )

    def _state(self, member: Member) -> Any:
        return state(member.stage, version=member.engine.version, members=REPLICAS)

    def _heldout_loss(self) -> float:
        first = [self._present(stage)[0] for stage in range(STAGES)]
        loss_sum = tokens = 0.0
        for number in range(HELDOUT_BATCHES):
            inputs, labels = windows(f"heldout/{number}", is_heldout=True)
            body: Source = inputs.numpy()
            for member in first[:-1]:
                body = bytes(member.span.forward_only(body, SHAPE, entry=member.stage)[0])
            result = first[-1].span.evaluate(body, SHAPE, labels.numpy(), entry=LAST)
            loss_sum, tokens = loss_sum + result.loss_sum, tokens + result.target_tokens
        return loss_sum / tokens

    def _count(
        self, db: Connection
    ) -> tuple[Counter[tuple[str, bool]], tuple[float, float], dict[tuple[PeerId, RoundId], int]]:
        honest = {member.peer for member in self.members if member.cheat is None}
        found: Counter[tuple[str, bool]] = Counter()
        outputs, returned = [0.0], [0.0]
        for peer, finding, *apart in db.execute("SELECT peer, finding, outputs, returned FROM audits"):
            found[finding, peer in honest] += 1
            self.by_peer[peer].audits += 1
            if peer in honest and finding == "valid":
                outputs.append(apart[0])
                returned.append(apart[1])
        paid: defaultdict[tuple[PeerId, RoundId], int] = defaultdict(int)
        for kind, peer, round_id, tokens in db.execute("SELECT kind, peer, round, tokens FROM credit_entries"):
            paid[peer, round_id] += {"work": tokens, "revoke": -tokens}.get(kind, 0)
        return found, (max(outputs), max(returned)), dict(paid)


def _taken(name: str, given: Sequence[Sequence[Tensor]], *, maker: int) -> Taken:
    """Return what one member was sent of the parts that it adds up."""
    parts = [part for part in cut([*map(len, given[0])], num_members=len(given)) if part.reducer == maker]
    taken = Taken(parts, num_members=len(given), using=codec(name), folder=None)
    for member, shards in enumerate(given):
        for slot, part in enumerate(parts):
            values = shards[part.shard][part.start : part.start + part.length].contiguous()
            taken.put(member, slot, codec(name).encode(values))
    return taken


async def _reduced(
    name: str, given: Sequence[Sequence[Tensor]], factors: Sequence[float], members: Sequence[Member]
) -> bytes:
    """Add contributions up part by part in member order, as a butterfly does; each member makes its parts."""
    made: list[bytes] = []
    for shards in zip(*given, strict=True):
        spans = list(spans_of(len(shards[0])))
        lengths = [length for _, length in spans]
        merger = OrderedMerger(codec(name), lengths, num_senders=len(shards), factors=factors)
        for part, (start, length) in enumerate(spans):
            pieces = [contribution(shard[start : start + length].contiguous(), using=codec(name)) for shard in shards]
            sums = await asyncio.gather(
                *(merger.accumulate_part(member, part, piece) for member, piece in enumerate(pieces))
            )
            cheat = members[len(made) % len(members)].cheat
            if cheat is not None:
                wrong = cheat.makes(codec(name).decode(sums[0], length))
                sums[0] = codec(name).encode(wrong.contiguous())
            made.append(bytes(sums[0]))
    return b"".join(made)
