"""What is taken down of a contribution. Oracle: sketches of tensors that are cut and added up by hand.

The engine is played; update bytes, what was taken and commits are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from peer.averaging.absorb import Update
from peer.averaging.parts import PART_ELEMENTS, cut
from peer.averaging.reduce import contribution, encode_shard
from peer.averaging.taken import Taken
from peer.codecs import codec
from peer.contributions import MAX_KEPT, Contributions
from protocol.audits import MAX_SHARES, ContributionReport, ShareOrder, contribution_seed
from protocol.ids import Lineage, PeerId, StageId
from protocol.rounds.lineage import next_lineage
from protocol.rounds.messages import Commit, Contribution
from protocol.sketch import distance, folded, sketch_shards, summed
from tests.coordinator.office import NO_LINEAGE, Volunteer, closing, commit, sign_closing
from tests.protocol.manifests import manifest

STAGE, MEMBERS = StageId(1), [Volunteer(name) for name in "abc"]
ME = MEMBERS[1].peer
EVERYBODY = tuple(member.peer for member in MEMBERS)
LENGTHS = (2 * PART_ELEMENTS + 100, 50, PART_ELEMENTS)  # 5 parts
RUN = manifest()


def shards(member: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(member)
    return [torch.randn(length, generator=generator) for length in LENGTHS]


class Engine:
    shards = tuple(SimpleNamespace(num_elements=length) for length in LENGTHS)
    has_contribution = True

    def __init__(self, *, is_local: bool = False, holds: bool = False) -> None:
        self.anchored = object() if is_local else None
        self.holds, self.whose = holds, 1

    def contribution_shard(self, number: int) -> Tensor:
        return shards(self.whose)[number]


def commits(name: str = "fp32", members: tuple[PeerId, ...] = EVERYBODY) -> Iterator[Commit]:
    """Yield commits, some of which are on record."""
    under = sign_closing(MEMBERS[0], closing(RUN, 0))
    group = tuple(Contribution(peer=peer, tokens=64, weight=64) for peer in members)
    for number in range(64):
        yield commit(
            RUN, 1, under, members=MEMBERS, parent=NO_LINEAGE, contributors=group, codec=name, norm=float(number)
        )


def recorded(name: str = "fp32", **changes: Any) -> Iterator[tuple[Commit, Lineage, bytes]]:
    for made in commits(name, **changes):
        lineage = next_lineage(made.parent, made.to_bytes())
        seed = contribution_seed(lineage)
        if seed is not None:
            yield made, lineage, seed


def update(name: str) -> Update:
    """The sum of all three, with what the second of them was sent of it."""
    using = codec(name)
    sent = [[contribution(shard, using=using) if name != "sparse" else shard for shard in shards(m)] for m in range(3)]
    data = b"".join(encode_shard(name, torch.stack(each).sum(0)) for each in zip(*sent, strict=True))
    own = [part for part in cut(LENGTHS, num_members=3) if part.reducer == 1]
    taken = Taken(own, num_members=3, using=using, folder=None)
    for member in range(3):
        for slot, part in enumerate(own):
            taken.put(
                member, slot, using.encode(shards(member)[part.shard][part.start : part.start + part.length].clone())
            )
    return Update(name, data, (64, 64, 64), taken=taken)


class Case:
    def __init__(self, engine: Engine, *, opening: object = "open") -> None:
        self.reports: list[ContributionReport] = []
        self.kept: list[StageId] = []
        self.contributions = Contributions(
            me=ME,
            engines=cast(Any, {STAGE: engine}),
            recomputer=cast(Any, SimpleNamespace(keep=self.kept.append)),
            gate=cast(Any, SimpleNamespace(opening=lambda stage: opening)),
            report=self.reports.append,
        )


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("is_local", [False, True])
def test_what_was_given_is_said_as_a_whole_and_share_by_share(name: str, is_local: bool) -> None:
    case = Case(Engine(is_local=is_local))
    made, lineage, seed = next(recorded(name))
    case.contributions.before_step(STAGE, made, update(name))
    (report,) = case.reports
    whole = sketch_shards([shard.numpy() for shard in shards(1)], seed)
    assert distance(whole, report.own) < (0.15 if name == "int4" else 0.02)
    answer = case.contributions.answer(ShareOrder(order=7, stage=STAGE, lineage=lineage))
    assert answer.order == 7
    assert len(answer.given) == len(answer.taken) == len(answer.totals) == 3
    assert distance(folded(report.own), summed(answer.given)) < 1e-5
    assert distance(folded(report.total), summed(answer.totals)) < 1e-5
    assert distance(answer.given[1], answer.taken[1]) < 0.02, "what we gave into our own share is what we took of it"
    assert distance(answer.totals[1], summed(answer.taken)) < (0.2 if name == "int4" else 0.02)
    for giver in (0, 2):
        assert distance(answer.given[1], answer.taken[giver]) > 0.5


@pytest.mark.parametrize("is_staged", [True, False])
def test_what_the_next_round_replaces_is_sketched_before_or_never(is_staged: bool) -> None:
    """With overlap the next gradient takes its place before the step. Oracle: a sketch of what was given, or none."""
    engine = Engine(holds=True)
    case = Case(engine)
    (made, _, seed), (later, _, _) = islice(recorded(), 2)
    if is_staged:
        case.contributions.before_replaced(STAGE, made, update("fp32"))
    else:
        case.contributions.before_replaced(STAGE, None, None)
    engine.whose = 2
    case.contributions.before_step(STAGE, made, update("fp32"))
    given = sketch_shards([shard.numpy() for shard in shards(1)], seed)
    assert [distance(given, report.own) < 1e-5 for report in case.reports] == [True] * is_staged
    case.contributions.before_step(STAGE, later, update("fp32"))
    assert len(case.reports) == 1 + is_staged, "the next one may be a step that nothing was frozen before"


def test_only_commits_on_record_are_looked_at_and_weights_are_kept_with_all() -> None:
    case = Case(Engine())
    for made in commits():
        case.contributions.before_step(STAGE, made, update("fp32"))
    assert len(case.reports) == len([*recorded()]) < len([*commits()]) == len(case.kept)


def test_who_did_not_help_to_sum_says_nothing_of_what_it_was_sent() -> None:
    case = Case(Engine())
    made, lineage, _ = next(recorded())
    fetched = update("fp32")
    case.contributions.before_step(STAGE, made, Update(fetched.codec, fetched.data, fetched.weights))
    answer = case.contributions.answer(ShareOrder(order=1, stage=STAGE, lineage=lineage))
    assert (len(answer.given), answer.taken) == (3, ())


def test_what_is_not_known_here_is_answered_with_nothing() -> None:
    answer = Case(Engine()).contributions.answer(ShareOrder(order=1, stage=STAGE, lineage=NO_LINEAGE))
    assert (answer.given, answer.taken, answer.totals) == ((), (), ())


def test_the_last_few_commits_are_remembered() -> None:
    case = Case(Engine())
    known = [*recorded()]
    for made, _, _ in known:
        case.contributions.before_step(STAGE, made, update("fp32"))
    answers = [case.contributions.answer(ShareOrder(order=1, stage=STAGE, lineage=each)) for _, each, _ in known]
    assert len(known) > MAX_KEPT
    assert [bool(answer.given) for answer in answers] == [False] * (len(known) - MAX_KEPT) + [True] * MAX_KEPT


@pytest.mark.parametrize("why", ["catching up", "not ours", "no sum", "sparse"])
def test_nothing_is_said_where_there_is_nothing_to_say(why: str) -> None:
    engine = Engine(is_local=why == "sparse")
    engine.has_contribution = why != "no sum"
    case = Case(engine, opening=None if why == "catching up" else "open")
    members = {"members": (MEMBERS[0].peer, MEMBERS[2].peer)} if why == "not ours" else {}
    name = "sparse" if why == "sparse" else "fp32"
    for made, _, _ in recorded(name, **members):
        case.contributions.before_step(STAGE, made, Update(name, b"", (64, 64, 64)))
    assert case.reports == []
    assert bool(case.kept) is (why != "catching up")


def test_of_too_many_members_only_the_whole_is_kept() -> None:
    """Nothing of it would fit a message."""
    many = (ME, *(PeerId(f"peer-{number}") for number in range(MAX_SHARES)))
    case = Case(Engine())
    made, lineage, _ = next(recorded(members=many))
    case.contributions.before_step(STAGE, made, update("fp32"))
    assert len(case.reports) == 1
    assert case.contributions.answer(ShareOrder(order=1, stage=STAGE, lineage=lineage)).given == ()
