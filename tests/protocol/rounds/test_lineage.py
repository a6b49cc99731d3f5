"""The chain of commits: what may follow what, and where others stand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from protocol.errors import PeerFault, SignatureError
from protocol.ids import Digest, Lineage, PeerId, RoundId, RunId, StageId, Version, digest
from protocol.rounds import Chain
from protocol.rounds.lineage import Relation, next_lineage
from protocol.rounds.messages import Commit, Contribution
from tests.protocol.rounds.builders import A, B, C, chain, charter, commit, seat, settings

BAD: dict[str, dict[str, Any]] = {
    "another run": {"run": RunId("ff")},
    "another stage": {"stage": StageId(2)},
    "another charter": {"generation": 2},
    "another parent": {"parent": Lineage(bytes(32))},
    "a version too many": {"version": Version(2)},
    "a gap in its rounds": {"first_round": RoundId(1), "round": RoundId(1)},
    "rounds that run backwards": {"first_round": RoundId(0), "round": RoundId(-1)},
    "a stranger among the contributors": {"contributors": (Contribution(peer=PeerId("x"), tokens=1, weight=1),)},
    "one contributor twice": {
        "contributors": (Contribution(peer=A, tokens=1, weight=1), Contribution(peer=A, tokens=1, weight=1))
    },
    "nothing to average": {"contributors": (Contribution(peer=A, tokens=0, weight=0),)},
    "nothing that counts": {"contributors": (Contribution(peer=A, tokens=5, weight=0),)},
    "more counts than was brought": {"contributors": (Contribution(peer=A, tokens=5, weight=6),)},
    "no seats": {"seats": ()},
    "one seat twice": {"seats": (seat(A), seat(A, 2))},
}


def test_a_commit_extends_the_chain_by_one_version() -> None:
    """Oracle: the hash over parent and commit bytes, computed here."""
    lineages = chain()
    root = lineages.head
    signed = commit(root.lineage)
    link = lineages.extend(signed)
    assert link.lineage == next_lineage(root.lineage, signed.payload) == lineages.head.lineage
    assert (link.version, link.next_round) == (1, 1)
    assert bytes(link.lineage) == digest(b"handcar commit", root.lineage, signed.payload)


@pytest.mark.parametrize("what", BAD)
def test_a_commit_with_a_flaw_is_refused(what: str) -> None:
    """The chain stays as it was."""
    lineages = chain()
    head = lineages.head
    with pytest.raises(PeerFault):
        lineages.extend(commit(head.lineage, **BAD[what]))
    assert lineages.head is head


def test_a_commit_must_be_signed_by_a_member_of_its_parent() -> None:
    """A stranger's signature is valid and still worth nothing."""
    lineages = chain()
    with pytest.raises(PeerFault, match="not a member"):
        lineages.extend(commit(lineages.head.lineage, signer=PeerId("x")))


def test_a_commit_of_a_round_that_the_run_does_not_have_is_refused() -> None:
    """A steward cannot end the run by its number."""
    ending = settings(rules=replace(settings().rules, last_round=RoundId(7)))
    lineages = Chain.of_charter(ending, charter(A, B, C))
    parent = lineages.head.lineage
    assert lineages.follows_head(commit(parent, round=RoundId(7)))
    with pytest.raises(PeerFault, match="none of the run's"):
        lineages.follows_head(commit(parent, round=RoundId(8)))


def test_which_member_signs_makes_no_difference_to_the_lineage() -> None:
    """Two stewards may finish the same ballot: same bytes, same lineage."""
    one, other = chain(), chain()
    signed = commit(one.head.lineage, signer=A)
    resigned = commit(one.head.lineage, signer=B, ballot=Commit.from_bytes(signed.payload).ballot)
    assert one.extend(signed).lineage == other.extend(resigned).lineage


def test_only_the_coordinator_founds_a_stage() -> None:
    """A charter that is signed by a member, or about another stage, is refused."""
    signed = charter(A)
    with pytest.raises(SignatureError):
        Chain.of_charter(settings(), signed.model_copy(update={"signer": A}))
    with pytest.raises(PeerFault):
        Chain.of_charter(settings(stage=StageId(7)), signed)


def test_relations_tell_behind_from_forked_from_forgotten() -> None:
    """Three commits, of which two are kept: every kind of other head that there is."""
    kept_two = settings(rules=replace(settings().rules, commits_kept=2))
    lineages = Chain.of_charter(kept_two, charter(A, B, C))
    heads = [lineages.head]
    for number in range(3):
        signed = commit(
            lineages.head.lineage, version=Version(number + 1), first_round=RoundId(number), round=RoundId(number)
        )
        heads.append(lineages.extend(signed))
    other = Lineage(bytes(32))
    assert lineages.relation(heads[3].lineage, Version(3)) is Relation.SAME
    assert lineages.relation(heads[2].lineage, Version(2)) is Relation.BEHIND
    assert lineages.relation(heads[1].lineage, Version(1)) is Relation.BEHIND
    assert lineages.relation(heads[0].lineage, Version(0)) is Relation.ANCIENT
    assert lineages.relation(other, Version(3)) is Relation.FORKED
    assert lineages.relation(other, Version(2)) is Relation.FORKED
    assert lineages.relation(other, Version(4)) is Relation.UNKNOWN
    assert [step.commit.version for step in lineages.steps_after(heads[1].lineage) or ()] == [2, 3]
    assert lineages.steps_after(heads[0].lineage) is None


def test_a_chain_from_history_starts_at_its_newest_commits() -> None:
    """Whoever fetched a snapshot knows the charter and the last commit, and nothing between."""
    full = chain()
    first = commit(full.head.lineage)
    full.extend(first)
    second = commit(full.head.lineage, version=Version(2), first_round=RoundId(1), round=RoundId(1), signer=C)
    full.extend(second)
    assert Chain.of_history(settings(), full.signed_charter, (second,)).head == full.head
    assert Chain.of_history(settings(), full.signed_charter, (first, second)).head == full.head
    assert Chain.of_history(settings(), full.signed_charter, ()).head == chain().head


@pytest.mark.parametrize("what", ["another run", "another stage", "another charter"])
def test_the_first_commit_of_a_history_is_not_believed_under_another_charter(what: str) -> None:
    """What was rolled back has its hashes in order as well."""
    full = chain()
    full.extend(commit(full.head.lineage))
    fields = {"version": Version(2), "first_round": RoundId(1), "round": RoundId(1), **BAD[what]}
    with pytest.raises(PeerFault):
        Chain.of_history(settings(), full.signed_charter, (commit(full.head.lineage, **fields),))


def test_every_field_of_a_commit_changes_the_lineage() -> None:
    """No field can be exchanged behind the hash's back."""
    parent = chain().head.lineage
    seen = {next_lineage(parent, commit(parent).payload)}
    for change in ({"digest": Digest(bytes(32))}, {"clip_scale": 0.25}, {"seats": (seat(A),)}, {"tokens_dropped": 1}):
        seen.add(next_lineage(parent, commit(parent, **change).payload))
    assert len(seen) == 5
