"""From receipts to credits, with the real SQLite. Oracle: two stages, A feeds B; sums by hand."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner

from coordinator.cli import coordinator
from coordinator.credits import QUIET_S, worth_of
from coordinator.store import credits, receipts, successors
from coordinator.store.bans import BanRow, add_ban
from coordinator.store.credits import Balance
from protocol.control import ReceiptReport, Report
from protocol.handover import hand_over
from protocol.ids import RoundId, StageId
from protocol.receipts import Hop
from protocol.rounds.messages import Credit
from protocol.signing import Signed
from tests.coordinator.office import START_WALL_S, Office, Volunteer, closing, closing_report, open_office, sign_closing
from tests.protocol import hops as builders
from tests.protocol.hops import signed_window

A, B, C = Volunteer("a"), Volunteer("b"), Volunteer("c")
TOKENS = 32
NUMBERS = 3
DAY_S = 86_400.0


def hop(number: int, *, returned: int = 1, tokens: int = TOKENS, callee: Volunteer = B) -> Hop:
    return builders.hop(number, A.peer, callee.peer, returned=returned, target_tokens=tokens)


def receipt(office: Office, by: Volunteer, *said: Hop, round_id: int = 0, session: int = 1) -> ReceiptReport:
    run = office.manifest.run_id
    return ReceiptReport(window=signed_window(by.key, *said, run=run, round_id=round_id, session=session))


def closed(office: Office, round_id: int = 0, *, by: Volunteer = A, callee: Volunteer = B) -> Signed:
    credited = tuple(
        Credit(stage=StageId(stage), peer=peer, tokens=NUMBERS * TOKENS)
        for stage, peer in ((0, A.peer), (1, callee.peer))
    )
    return sign_closing(by, closing(office.manifest, round_id).model_copy(update={"credits": credited}))


async def enter(office: Office) -> None:
    for volunteer in (A, B, C):
        await office.join(volunteer)


async def say(office: Office, by: Volunteer, *reports: Report, first: int = 1) -> None:
    await office.beat(by, reports=tuple(enumerate(reports, start=first)))


async def hand_in(office: Office, round_id: int = 0, *, first: int = 1) -> None:
    """Have both ends of three hops say the same of them."""
    hops = [hop(number) for number in range(NUMBERS)]
    await say(
        office,
        A,
        closing_report(closed(office, round_id)),
        receipt(office, A, *hops, round_id=round_id),
        first=first,
    )
    await say(office, B, receipt(office, B, *hops, round_id=round_id), first=first)


async def balances(office: Office) -> dict[str, Balance]:
    found = await office.services.database.run(credits.balances)
    return {volunteer.name: found[volunteer.peer] for volunteer in (A, B, C) if volunteer.peer in found}


def worth(office: Office, stage: int, tokens: int) -> int:
    return worth_of(office.manifest)(StageId(stage), tokens)


async def test_what_both_ends_vouch_for_is_held_and_after_a_day_it_is_free(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await enter(office)
        await hand_in(office)
        assert await balances(office) == {}
        await office.tick(QUIET_S)
        tokens = NUMBERS * TOKENS
        assert await balances(office) == {
            "a": Balance(held_mflop=worth(office, 0, tokens), held_tokens=tokens),
            "b": Balance(held_mflop=worth(office, 1, tokens), held_tokens=tokens),
        }
        await office.tick(DAY_S - 60)
        assert (await balances(office))["a"].free_mflop == 0
        await office.tick(120)
        assert await balances(office) == {
            "a": Balance(free_mflop=worth(office, 0, tokens), free_tokens=tokens),
            "b": Balance(free_mflop=worth(office, 1, tokens), free_tokens=tokens),
        }


async def test_receipts_of_a_peer_that_was_cut_off_for_a_week_are_settled_exactly_once(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await enter(office)
        hops = [hop(number) for number in range(NUMBERS)]
        await say(office, A, closing_report(closed(office)), receipt(office, A, *hops))
        await office.tick(QUIET_S)
        assert await balances(office) == {}
        await office.tick(DAY_S / 2)
        late = receipt(office, B, *hops)
        await say(office, B, late)
        await say(office, B, late)  # its acknowledgement was lost
        await say(office, B, late, first=2)  # handed in once more under another number
        for _ in range(3):
            await office.tick(QUIET_S)
        assert {name: balance.held_tokens for name, balance in (await balances(office)).items()} == {
            "a": NUMBERS * TOKENS,
            "b": NUMBERS * TOKENS,
        }


async def test_what_comes_drop_by_drop_adds_up_to_what_comes_at_once(tmp_path: Path) -> None:
    """Rounding included: the worth of the whole, not the sum of rounded pieces."""
    async with open_office(tmp_path) as office:
        await enter(office)
        hops = [hop(number) for number in range(NUMBERS)]
        await say(office, A, closing_report(closed(office)), receipt(office, A, *hops))
        for number, each in enumerate(hops, start=1):
            await say(office, B, receipt(office, B, each, session=number), first=number)
            await office.tick(QUIET_S)
            assert (await balances(office))["b"].held_tokens == number * TOKENS
        assert (await balances(office))["b"].held_mflop == worth(office, 1, NUMBERS * TOKENS)


async def test_receipts_may_come_before_the_closing_of_their_round(tmp_path: Path) -> None:
    """Of somebody who leaves in the middle of the round, for example; settled to nothing until the closing is there."""
    async with open_office(tmp_path) as office:
        await enter(office)
        hops = [hop(number) for number in range(NUMBERS)]
        await say(office, A, receipt(office, A, *hops))
        await say(office, B, receipt(office, B, *hops))
        await office.tick(QUIET_S)
        assert await balances(office) == {}
        await say(office, A, closing_report(closed(office)), first=2)
        await office.tick(QUIET_S)
        assert (await balances(office))["b"].held_tokens == NUMBERS * TOKENS


async def test_one_side_alone_earns_nothing_and_a_contradiction_is_on_record(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await enter(office)
        await say(office, A, closing_report(closed(office)), receipt(office, A, hop(0), hop(1)))
        await say(office, B, receipt(office, B, hop(0), hop(1, returned=9), hop(2)))
        await office.tick(QUIET_S)
        assert (await balances(office))["a"].held_tokens == TOKENS
        assert (await balances(office))["b"].held_tokens == TOKENS
        assert await office.services.database.run(receipts.count_disputes) == {A.peer: (2, 1), B.peer: (2, 1)}
        await say(office, A, receipt(office, A, hop(2), session=2), first=9)
        await office.tick(QUIET_S)  # the late one settles one of the two
        assert await office.services.database.run(receipts.count_disputes) == {A.peer: (1, 1), B.peer: (1, 1)}


async def test_two_receipts_under_one_name_are_evidence_and_the_first_counts(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await enter(office)
        await hand_in(office)
        await say(office, B, receipt(office, B, hop(0, returned=9)), first=5)
        await office.tick(QUIET_S)
        (found,) = await office.services.database.run(receipts.evidence_of, B.peer)
        assert found.kind == receipts.CONTRADICTION
        assert (await balances(office))["b"].held_tokens == NUMBERS * TOKENS


async def test_what_is_held_can_be_taken_back_and_what_is_free_cannot(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await enter(office)
        await hand_in(office, 0)
        await office.tick(QUIET_S)
        await office.tick(DAY_S + 1)
        await hand_in(office, 1, first=10)
        await office.tick(QUIET_S)
        tokens, database = NUMBERS * TOKENS, office.services.database
        taken = await database.run(credits.revoke, B.peer, reason="zeros", at_s=1.0)
        assert taken == worth(office, 1, tokens)
        assert (await balances(office))["b"] == Balance(free_mflop=worth(office, 1, tokens), free_tokens=tokens)
        assert await database.run(credits.revoke, B.peer, reason="again", at_s=2.0) == 0
        await office.tick(DAY_S + 1)  # nothing of it comes back, and A's was not touched
        assert (await balances(office))["b"].free_tokens == tokens
        assert (await balances(office))["a"].free_tokens == 2 * tokens


async def test_every_account_of_a_peer_adds_up_to_nothing_and_entries_cannot_be_changed(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await enter(office)
        await hand_in(office)
        await office.tick(QUIET_S)
        await office.services.database.run(credits.revoke, B.peer, reason="test", at_s=1.0)
        await office.tick(DAY_S + 1)

        def sums(db: sqlite3.Connection) -> tuple[list[int], list[tuple[object, ...]], list[tuple[object, ...]]]:
            by_peer = [row[0] for row in db.execute("SELECT sum(mflop) FROM balances GROUP BY peer")]
            by_entries = db.execute(
                """
                SELECT peer, account, sum(mflop), sum(tokens) FROM (
                    SELECT peer, credit AS account, mflop, tokens FROM credit_entries
                    UNION ALL SELECT peer, debit, -mflop, -tokens FROM credit_entries
                ) GROUP BY peer, account ORDER BY peer, account
                """
            ).fetchall()
            kept = db.execute("SELECT peer, account, mflop, tokens FROM balances ORDER BY peer, account").fetchall()
            return by_peer, by_entries, kept

        by_peer, by_entries, kept = await office.services.database.run(sums)
        assert by_peer == [0, 0]
        assert by_entries == kept
        for sql in ("UPDATE credit_entries SET mflop = 1", "DELETE FROM credit_entries"):
            with pytest.raises(sqlite3.IntegrityError, match="never"):
                await office.services.database.run(sqlite3.Connection.execute, sql)


async def test_a_flood_of_receipts_stays_small(tmp_path: Path) -> None:
    """Of a round nobody closed none is kept; of one that is over, no more than anybody can need."""
    async with open_office(tmp_path) as office:
        await enter(office)
        await say(office, B, receipt(office, B, hop(0), round_id=7))
        await say(office, A, closing_report(closed(office)))
        for session in range(60):
            await say(office, B, receipt(office, B, hop(0), session=session + 1), first=session + 10)

        def count(db: sqlite3.Connection) -> list[tuple[int, int]]:
            return db.execute("SELECT round, count(*) FROM receipts GROUP BY round").fetchall()

        assert await office.services.database.run(count) == [(0, 16)]


async def test_receipts_of_stages_that_there_are_not_are_not_believed(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await enter(office)
        wrong = [
            hop(office.manifest.batch.microbatches_per_round),
            hop(0, tokens=1 << 20),
            Hop(0, A.peer, B.peer, StageId(1), 2, TOKENS, bytes(16), bytes(16)),
        ]
        await say(office, A, closing_report(closed(office)), *(receipt(office, A, each) for each in wrong))
        assert (
            await office.services.database.run(receipts.due_rounds, quiet_since_s=9e9, waiting_since_s=0, limit=9) == []
        )


async def test_a_closing_cannot_credit_more_than_it_counts(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await enter(office)
        good = closing(office.manifest, 0)
        greedy = tuple(Credit(stage=StageId(1), peer=peer, tokens=good.target_tokens - 1) for peer in (B.peer, C.peer))
        signed = sign_closing(A, good.model_copy(update={"credits": greedy}))
        await say(office, A, closing_report(signed))
        assert await office.services.database.run(receipts.receipts_of, RoundId(0)) == receipts.RoundReceipts(
            (), (), {}
        )


async def test_credits_follow_a_peer_to_its_next_key(tmp_path: Path) -> None:
    """Also for receipts that the old key had signed and not handed in: only its successor may bring them."""
    async with open_office(tmp_path) as office:
        await enter(office)
        await hand_in(office, 0)
        await office.tick(QUIET_S)
        hops = [hop(number) for number in range(NUMBERS)]
        late = receipt(office, B, *hops, round_id=1)
        await say(office, A, closing_report(closed(office, 1)), receipt(office, A, *hops, round_id=1), first=10)
        await say(office, C, late, first=10)
        await office.tick(QUIET_S)
        tokens, database = NUMBERS * TOKENS, office.services.database
        assert (await balances(office))["b"].held_tokens == tokens, "it was not C's to hand in"
        new = Volunteer("new")
        await office.join(new, name="b", handovers=(hand_over(B.key, new.peer, issued_s=START_WALL_S),))
        await say(office, new, late, first=10)
        await office.tick(QUIET_S)
        document = await asyncio.to_thread(office.services.shared_status)
        shown = {peer["name"]: (peer["peer"], peer["credits"]["held_tokens"]) for peer in document["peers"]}
        assert shown == {"a": (A.peer, 2 * tokens), "b": (new.peer, 2 * tokens), "c": (C.peer, 0)}
        assert await database.run(successors.all_newest) == {B.peer: new.peer}


async def test_who_is_banned_earns_nothing_for_what_an_earlier_key_did_and_a_frozen_key_does(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await enter(office)
        await hand_in(office)
        new, database = Volunteer("new"), office.services.database
        await office.join(new, name="b", handovers=(hand_over(B.key, new.peer, issued_s=START_WALL_S),))
        ban = BanRow(peer=new.peer, since_s=START_WALL_S, until_s=None, reason="zeros")
        frozen = BanRow(peer=A.peer, since_s=START_WALL_S, until_s=None, reason="", kind="frozen")
        await database.run(add_ban, ban)
        await database.run(add_ban, frozen)
        await office.tick(QUIET_S)
        assert set(await balances(office)) == {"a"}


def test_what_is_taken_back_is_also_what_earlier_keys_earned(tmp_path: Path) -> None:
    new = Volunteer("new")

    async def earn_and_rotate() -> int:
        async with open_office(tmp_path) as office:
            await enter(office)
            await hand_in(office)
            await office.tick(QUIET_S)
            await office.join(new, name="b", handovers=(hand_over(B.key, new.peer, issued_s=START_WALL_S),))
            return worth(office, 1, NUMBERS * TOKENS)

    earned = asyncio.run(earn_and_rotate())
    result = CliRunner().invoke(coordinator, ["ban", str(tmp_path), "b", "--revoke-credits", "--json"])
    data = json.loads(result.stdout)["data"]
    assert (data["peer"], data["revoked_mflop"]) == (new.peer, earned)


async def test_the_status_shows_credits_and_disputes(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await enter(office)
        await hand_in(office)
        await say(office, A, receipt(office, A, hop(2, callee=C), session=4), first=20)
        await say(office, C, receipt(office, C, hop(1, callee=C), session=4), first=20)
        await office.tick(QUIET_S)
        await office.services.registry.save()
        document = await asyncio.to_thread(office.services.shared_status)
        shown = {peer["name"]: (peer["credits"]["held_tokens"], peer["disputed_hops"]) for peer in document["peers"]}
        assert shown == {"a": (NUMBERS * TOKENS, 2), "b": (NUMBERS * TOKENS, 0), "c": (0, 2)}


async def test_who_is_banned_earns_nothing_for_what_was_not_settled_yet(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await enter(office)
        await hand_in(office)
        row = BanRow(peer=B.peer, since_s=office.services.clock.wall(), until_s=None, reason="cheats")
        await office.services.database.run(add_ban, row)
        await office.tick(QUIET_S)
        assert set(await balances(office)) == {"a"}
