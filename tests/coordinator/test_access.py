"""Who is let in: invites, keys that were replaced, cloned identities, and the organiser's commands.

Oracles: who was let in, what the refused are told, the rows of a real SQLite file; a clock that only the test moves.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from coordinator.access import make_invite, revoke
from coordinator.cli import coordinator
from coordinator.listening import keep
from coordinator.store import bans, history, invites, successors
from coordinator.store.bans import BanRow, add_ban, remove_ban
from coordinator.store.credits import Work, balances, book_work, by_person
from coordinator.store.database import DATABASE_FILE
from coordinator.store.schema import MIGRATIONS
from protocol.errors import RefusedError, SignatureError
from protocol.handover import hand_over
from protocol.ids import PeerId, RoundId, StageId
from protocol.invite import Invite
from protocol.signing import Signed
from tests.coordinator.office import START_WALL_S, Office, StoppedTime, Volunteer, open_office, state
from tests.protocol.manifests import KEY, manifest

A, B, C = Volunteer("a"), Volunteer("b"), Volunteer("c")
DAY_S = 86_400.0


async def invited(office: Office, *, uses: int = 1, for_s: float | None = None, note: str = "") -> tuple[str, str]:
    """Make an invite; return its id and its token."""
    now_s = START_WALL_S + office.time.now_s
    expires_s = None if for_s is None else now_s + for_s
    row, token = await office.services.database.run(
        lambda db: make_invite(db, uses=uses, expires_s=expires_s, note=note, now_s=now_s)
    )
    return row.id, token


async def take_back(office: Office, invite: str) -> tuple[PeerId, ...] | None:
    now_s = START_WALL_S + office.time.now_s
    return await office.services.database.run(lambda db: revoke(db, invite, now_s=now_s))


async def refusal(attempt: Awaitable[object]) -> str:
    with pytest.raises(RefusedError) as refused:
        await attempt
    assert len(refused.value.one_line().splitlines()) == 1
    return str(refused.value)


async def events(office: Office) -> list[tuple[str, PeerId | None]]:
    found = await office.services.database.run(lambda db: history.last_events(db, limit=50))
    kinds = ("peer.banned", "peer.frozen", "peer.rotated", "peer.unbanned")
    return [(event.kind, event.peer) for event in reversed(found) if event.kind in kinds]


# -- invites --------------------------------------------------------------------------------------------


async def test_an_open_run_asks_for_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        _, token = await invited(office)
        await office.join(A)
        await office.join(B, token=token)
        await office.join(C, token="nonsense")
        assert await office.services.database.run(invites.load_uses) == []


async def test_by_invitation_is_kept_until_it_is_said_otherwise(tmp_path: Path) -> None:
    starts: tuple[tuple[dict[str, Any], bool], ...] = (
        ({}, True),
        ({"access": "invite"}, False),
        ({}, False),
        ({"access": "open"}, True),
    )
    for settings, is_open in starts:
        async with open_office(tmp_path, **settings) as office:
            if is_open:
                await office.join(A)
            else:
                assert "has no token" in await refusal(office.join(A))


async def test_each_invite_that_does_not_fit_is_told_why(tmp_path: Path) -> None:
    async with open_office(tmp_path, access="invite") as office:
        for token in (None, ""):
            assert "has no token" in await refusal(office.join(A, token=token))
        assert "does not know the token" in await refusal(office.join(A, token="sesame"))
        _, short = await invited(office, for_s=60.0)
        _, single = await invited(office)
        name, revoked = await invited(office)
        await office.join(B, token=single)
        assert "is used up" in await refusal(office.join(A, token=single))
        assert await take_back(office, name) == ()
        assert "was revoked" in await refusal(office.join(A, token=revoked))
        office.time.advance(60.0)
        assert "has expired, on 2023-11-14 at 22:14 UTC" in await refusal(office.join(A, token=short))
        assert [peer.peer for peer in office.services.registry.everybody()] == [B.peer]


async def test_a_use_is_a_peer_and_not_a_registration(tmp_path: Path) -> None:
    """Again, after a restart of either side, after its end, and with whatever token: who is in is in."""
    time = StoppedTime()
    async with open_office(tmp_path, time=time, access="invite") as office:
        _, token = await invited(office, uses=2, for_s=60.0)
        await office.join(A, token=token)
        await office.join(A, token=token, session=2)
        await office.join(B, token=token)
    async with open_office(tmp_path, time=time) as office:
        office.time.advance(DAY_S)
        for volunteer, brought in ((A, token), (B, token), (A, None), (B, "nonsense")):
            await office.join(volunteer, token=brought, session=3)
        uses = await office.services.database.run(invites.load_uses)
        assert sorted(use.peer for use in uses) == sorted([A.peer, B.peer])


async def test_of_many_that_race_for_the_last_use_one_gets_it(tmp_path: Path) -> None:
    async with open_office(tmp_path, access="invite") as office:
        _, token = await invited(office, uses=3)
        crowd = [Volunteer(f"v{number}") for number in range(12)]
        done = await asyncio.gather(*(office.join(one, token=token) for one in crowd), return_exceptions=True)
        assert sum(isinstance(each, RefusedError) and "used up" in str(each) for each in done) == 9
        assert len(office.services.registry.everybody()) == 3


async def test_what_is_used_when_the_coordinator_dies_is_the_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies after the use is on disk, and before anything else: the peer comes in with the next try."""

    class Killed(BaseException):
        pass

    time = StoppedTime()
    async with open_office(tmp_path, time=time, access="invite") as office:
        _, token = await invited(office)

        def die(*_: object) -> None:
            raise Killed

        monkeypatch.setattr(office.services.registry, "_place", die)
        with pytest.raises(Killed):
            await office.join(A, token=token)
    async with open_office(tmp_path, time=time) as office:
        assert "used up" in await refusal(office.join(B, token=token))
        await office.join(A, token=token)


async def test_a_revocation_puts_out_who_came_in_and_the_organiser_may_make_exceptions(tmp_path: Path) -> None:
    async with open_office(tmp_path, access="invite") as office:
        name, token = await invited(office, uses=2)
        _, other = await invited(office)
        for volunteer, brought in ((A, token), (B, token), (C, other)):
            await office.join(volunteer, token=brought)
            await office.beat(volunteer, state(0))
        assert await take_back(office, name) == tuple(sorted((A.peer, B.peer)))
        assert await take_back(office, name) is None, "once"
        await office.tick(1.0)
        assert [peer.peer for peer in office.services.registry.live()] == [C.peer]
        for attempt in (office.beat(A, state(0)), office.join(A, token=token)):
            assert f"invite {name} was revoked" in await refusal(attempt)
        await office.services.database.run(remove_ban, A.peer)
        await office.tick(1.0)
        await office.join(A, token=token)
        assert "banned" in await refusal(office.join(B, token=other))


async def test_the_token_is_nowhere_on_disk(tmp_path: Path) -> None:
    async with open_office(tmp_path, access="invite") as office:
        _, token = await invited(office)
        await office.join(A, token=token)
        assert len(token) >= 128 / 6
        assert not [path for path in tmp_path.iterdir() if token.encode() in path.read_bytes()]


# -- keys that were replaced ----------------------------------------------------------------------------


def to(old: Volunteer, new: Volunteer) -> Signed:
    return hand_over(old.key, new.peer, issued_s=START_WALL_S)


async def test_a_successor_takes_over_the_way_in_and_the_old_key_is_dead(tmp_path: Path) -> None:
    async with open_office(tmp_path, access="invite") as office:
        _, token = await invited(office)
        await office.join(A, token=token)
        await office.beat(A, state(0))
        office.time.advance(100.0)
        for session in (1, 2):  # it shows the statement whenever it registers
            await office.join(B, token=token, handovers=(to(A, B),), session=session)
        await office.tick(1.0)
        assert [use.peer for use in await office.services.database.run(invites.load_uses)] == [B.peer]
        assert [peer.peer for peer in office.services.registry.live()] == [B.peer]
        assert office.services.registry.live()[0].joined_s == START_WALL_S, "it is as old as it was"
        for attempt in (office.join(A, token=token), office.beat(A, state(0))):
            assert f"replaced by {B.peer}" in await refusal(attempt)
        assert await events(office) == [("peer.rotated", A.peer)]
        await office.tick(2 * DAY_S)  # its last pass has run out, and it is on no list any more
        assert f"replaced by {B.peer}" in await refusal(office.join(A, token=token))
        assert "used up" in await refusal(office.join(C, token=token))


async def test_a_key_has_one_successor(tmp_path: Path) -> None:
    """Whoever copied it comes too late, or the owner does and hears of it."""
    async with open_office(tmp_path) as office:
        await office.join(A)
        await office.join(B, handovers=(to(A, B),))
        assert f"replaced by {B.peer}" in await refusal(office.join(C, handovers=(to(A, C),)))
        with pytest.raises(SignatureError):
            await office.join(C, handovers=(to(A, B),))


async def test_a_chain_of_rotations_is_followed_also_over_keys_that_never_came(tmp_path: Path) -> None:
    async with open_office(tmp_path, access="invite") as office:
        _, token = await invited(office)
        before, between = Volunteer("before"), Volunteer("between")
        await office.join(A, token=token)
        chain = (to(before, A), to(A, between), to(between, C))
        await office.join(C, handovers=chain)
        found = await office.services.database.run(successors.predecessors, C.peer)
        assert found == tuple(sorted((A.peer, between.peer))), "of what came before it knew nothing"
        assert await office.services.database.run(successors.newest, A.peer) == C.peer


async def test_a_ban_cannot_be_shed_by_a_rotation(tmp_path: Path) -> None:
    async with open_office(tmp_path, access="invite") as office:
        _, token = await invited(office)
        await office.join(A, token=token)
        ban = BanRow(peer=A.peer, since_s=START_WALL_S, until_s=START_WALL_S + 60.0, reason="nonsense")
        await office.services.database.run(add_ban, ban)
        await office.tick(1.0)
        assert "banned: nonsense" in await refusal(office.join(B, token=token, handovers=(to(A, B),)))
        assert "banned: nonsense" in await refusal(office.join(C, handovers=(to(A, B), to(B, C))))
        assert "used up" in await refusal(office.join(B, token=token)), "without it, it is a newcomer"
        assert await office.services.database.run(successors.successor_of, A.peer) is None
        await office.tick(60.0)
        await office.join(B, handovers=(to(A, B),))


# -- cloned identities ----------------------------------------------------------------------------------


async def both_beat(office: Office, one: Volunteer, other: Volunteer, *, for_s: float) -> float:
    """Let two processes beat in turns; return how long that went well."""
    for second in range(int(for_s)):
        try:
            await office.beat((one, other)[second % 2], state(0), addresses=(f"/ip4/192.0.2.{second % 2}/tcp/1",))
        except RefusedError:
            return float(second)
        await office.tick(1.0)
    return for_s


async def test_two_processes_with_one_key_are_frozen_and_both_are_told(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        copy = Volunteer("a", session=2, process=2)
        await office.join(A)
        await office.join(copy)
        assert await both_beat(office, A, copy, for_s=120.0) < 60.0
        await office.tick(1.0)
        for attempt in (office.beat(A), office.beat(copy), office.join(A, session=3), office.join(copy, session=4)):
            with pytest.raises(RefusedError, match="frozen: two processes use this peer's key") as refused:
                await attempt
            assert "peer identity rotate" in refused.value.hint
        assert office.services.registry.live() == ()
        assert await events(office) == [("peer.frozen", A.peer)]
        assert office.services.bans.newest is not None


async def test_a_frozen_identity_is_thawed_by_a_rotation_or_by_the_organiser(tmp_path: Path) -> None:
    time = StoppedTime()
    copy = Volunteer("a", process=2)
    async with open_office(tmp_path, time=time, access="invite") as office:
        _, token = await invited(office, uses=2)
        for volunteer in (A, copy, C):
            await office.join(volunteer, token=token)
        await both_beat(office, A, copy, for_s=120.0)
    async with open_office(tmp_path, time=time) as office:  # the freeze outlives a restart
        assert "frozen" in await refusal(office.join(A, token=token))
        await office.join(B, token=token, handovers=(to(A, B),))
        await office.tick(1.0)
        assert f"replaced by {B.peer}" in await refusal(office.join(A, token=token))
        other = Volunteer("c", process=2)
        await office.join(other)
        await both_beat(office, C, other, for_s=120.0)
        await office.tick(1.0)
        assert "frozen" in await refusal(office.join(C))
        await office.services.database.run(remove_ban, C.peer)
        await office.tick(1.0)
        await office.join(C)
        assert await both_beat(office, C, C, for_s=60.0) == 60.0
        assert ("peer.unbanned", C.peer) in await events(office)


async def test_restarts_moves_and_new_addresses_freeze_nobody(tmp_path: Path) -> None:
    """Restarted at once, moved by the coordinator (a new session), given another address, gone on elsewhere."""
    async with open_office(tmp_path) as office:
        for life in range(5):
            volunteer = Volunteer("a", session=10 * life + 1, process=life + 1)
            await office.join(volunteer)
            for second in range(40):
                if second % 10 == 0:
                    await office.join(volunteer, session=10 * life + 2 + second // 10)
                await office.beat(volunteer, state(0), addresses=(f"/ip4/192.0.{life}.{second % 2}/tcp/1",))
                await office.tick(2.0)
            if life:
                await office.beat(Volunteer("a", process=life), state(0))  # that was under way for long
        assert await events(office) == []


# -- commands -------------------------------------------------------------------------------------------


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(coordinator, [str(word) for word in arguments])


def said(*arguments: str | Path) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["data"]


def serve(folder: Path, visit: Callable[[Office], Awaitable[None]] | None = None, **settings: Any) -> None:
    """Open the run's services as `coordinator run` does, let somebody visit, and close them again."""
    served = Invite(addresses=("/ip4/192.0.2.1/tcp/1",), run=manifest().run_id, coordinator=KEY.peer_id)

    async def once() -> None:
        async with open_office(folder, **settings) as office:
            await office.services.database.run(keep, listen=(), invite=served)
            if visit is not None:
                await visit(office)

    asyncio.run(once())


def test_an_invite_is_made_used_listed_and_taken_back(tmp_path: Path) -> None:
    serve(tmp_path, access="invite")
    made = said("invite", tmp_path, "--uses", "2", "--expires", "7d", "--note", "Ada")
    token = Invite.from_text(made["invite"]).token

    async def come(office: Office) -> None:
        await office.join(A, token=token, name="oak", clock_s=START_WALL_S)

    serve(tmp_path, come)
    (row,) = said("invites", tmp_path)["invites"]
    assert (row["id"], row["note"], row["uses_left"], row["state"]) == (made["id"], "Ada", 1, "good")
    assert row["expires_s"] - row["created_s"] == 7 * DAY_S
    assert [(peer["peer"], peer["name"]) for peer in row["peers"]] == [(A.peer, "oak")]
    assert "came in: oak  Ada" in call("invites", tmp_path).stdout
    assert said("uninvite", tmp_path, made["id"])["banned"] == [A.peer]
    assert said("invites", tmp_path)["invites"][0]["state"] == "revoked"
    (ban,) = said("bans", tmp_path)["bans"]
    assert (ban["peer"], ban["reason"]) == (A.peer, f"invite {made['id']} was revoked")
    assert token is not None
    assert token not in call("invites", tmp_path).output


def test_without_options_an_open_run_shows_what_was_served_and_one_by_invitation_makes_a_new_one(
    tmp_path: Path,
) -> None:
    serve(tmp_path)
    assert Invite.from_text(said("invite", tmp_path)["invite"]).token is None
    assert said("invites", tmp_path) == {"access": "open", "invites": []}
    made = call("invite", tmp_path, "--uses", "5")
    assert "this run is open" in made.stderr
    assert Invite.from_text(made.stdout).token is not None
    serve(tmp_path, access="invite")
    tokens = {Invite.from_text(call("invite", tmp_path).stdout).token for _ in range(3)}
    assert len(tokens) == 3
    assert None not in tokens
    assert [row["uses"] for row in said("invites", tmp_path)["invites"]] == [5, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("invite", "--expires", "soon"), "'soon' is no time"),
        (("invite", "--expires", "0h"), "'0h' is no time"),
        (("invite", "--note", "x" * 201), "at most 200"),
        (("invite", "--note", "a\nb"), "printable"),
        (("uninvite", "12345678"), "no invite '12345678'"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[:20].replace("\n", " "),
)
def test_what_cannot_be_is_one_line_and_changes_nothing(tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    serve(tmp_path, access="invite")
    command, *rest = arguments
    result = call(command, tmp_path, *rest)
    assert (result.exit_code, len(result.stderr.strip().splitlines()), result.stdout) == (3, 1, ""), result.output
    assert text in result.stderr
    assert said("invites", tmp_path)["invites"] == []


def test_uses_are_at_least_one(tmp_path: Path) -> None:
    assert call("invite", tmp_path, "--uses", "0").exit_code == 2


def test_a_folder_without_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    for command in (("invite", tmp_path), ("invite", tmp_path, "--uses", "2"), ("invites", tmp_path)):
        assert call(*command).exit_code == 3
    assert call("uninvite", tmp_path, "12345678").exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_ban_of_an_old_key_or_of_the_name_means_the_newest_key(tmp_path: Path) -> None:
    async def rotate(office: Office) -> None:
        await office.join(A, name="oak")
        await office.join(B, name="oak", handovers=(to(A, B),))

    serve(tmp_path, rotate)
    assert said("bans", tmp_path)["bans"] == [], "a key that was replaced is not banned"
    for who in (A.peer, "oak"):
        assert said("ban", tmp_path, who)["peer"] == B.peer
        assert said("unban", tmp_path, who)["peer"] == B.peer


def test_unban_thaws(tmp_path: Path) -> None:
    async def clone(office: Office) -> None:
        copy = Volunteer("a", process=2)
        await office.join(A, name="oak")
        await office.join(copy, name="oak")
        await both_beat(office, A, copy, for_s=120.0)

    serve(tmp_path, clone)
    (row,) = said("bans", tmp_path)["bans"]
    assert (row["peer"], row["kind"]) == (A.peer, "frozen")
    assert "frozen until the organiser takes it back" in call("bans", tmp_path).stdout
    said("unban", tmp_path, "oak")
    assert said("bans", tmp_path)["bans"] == []


# -- the database ---------------------------------------------------------------------------------------


def test_a_ban_is_never_shortened_or_weakened_by_what_comes_by_itself(tmp_path: Path) -> None:
    """Oracle: the table of what holds, what comes, what holds then."""
    serve(tmp_path)
    week, hour = 7 * DAY_S, 3600.0
    table: list[tuple[tuple[float | None, bans.Kind], tuple[float | None, bans.Kind], bool]] = [
        ((None, "banned"), (hour, "banned"), False),
        ((week, "banned"), (hour, "banned"), False),
        ((hour, "banned"), (week, "banned"), True),
        ((week, "banned"), (None, "frozen"), False),
        ((None, "frozen"), (hour, "banned"), False),
        ((0.5, "banned"), (hour, "banned"), True),
    ]
    with sqlite3.connect(tmp_path / DATABASE_FILE) as db:
        for (until_s, kind), (then_s, then), is_taken in table:
            before = BanRow(peer=A.peer, since_s=0.0, until_s=until_s, reason="", kind=kind)
            after = BanRow(peer=A.peer, since_s=1.0, until_s=then_s, reason="", kind=then)
            add_ban(db, before)
            expected = after if is_taken else before
            assert bans.add_milder_ban(db, after) == expected
            assert bans.find_ban(db, A.peer, now_s=1.0) == expected
    db.close()


def test_bans_come_before_keys_that_were_replaced(tmp_path: Path) -> None:
    """A list has room for some. Oracle: who comes first, though it was put there earlier."""
    serve(tmp_path)
    with sqlite3.connect(tmp_path / DATABASE_FILE) as db:
        add_ban(db, BanRow(peer=A.peer, since_s=1.0, until_s=None, reason=""))
        add_ban(db, BanRow(peer=B.peer, since_s=2.0, until_s=None, reason="", kind="rotated"))
        assert [row.peer for row in bans.load_bans(db, now_s=3.0)] == [A.peer, B.peer]
    db.close()


def test_credits_follow_the_person(tmp_path: Path) -> None:
    """Oracle: sums by hand; the book's rows stay under the keys that earned them."""
    with sqlite3.connect(tmp_path / "book.sqlite3") as db:
        for script in MIGRATIONS:
            db.executescript(script)
        work = {(StageId(0), A.peer): Work(3, 30), (StageId(0), B.peer): Work(4, 40), (StageId(0), C.peer): Work(5, 50)}
        book_work(db, RoundId(1), work, at_s=1.0)
        successors.add_successor(db, A.peer, B.peer, statement=b"", now_s=2.0)
        found = by_person(db)
        assert {peer: balance.held_mflop for peer, balance in found.items()} == {B.peer: 70, C.peer: 50}
        assert found[B.peer].held_tokens == 7
        assert balances(db)[A.peer].held_mflop == 30
