"""Keeping peers out: lists that only grow in number, what the banned hear, the organiser's commands.

Oracles: signed lists opened by hand, replies, exit codes; a clock that only the test moves.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from coordinator import bans
from coordinator.cli import coordinator
from coordinator.store import history
from coordinator.store.bans import BanRow, add_ban, remove_ban
from protocol.access import REVOCATION_CONTEXT, Revocations
from protocol.control import BeatReply
from protocol.errors import RefusedError, StorageError
from protocol.ids import PeerId
from protocol.signing import unseal
from tests.coordinator.office import START_WALL_S, Office, StoppedTime, Volunteer, open_office, state
from tests.protocol.manifests import KEY

A, B = Volunteer("a"), Volunteer("b")


async def ban(office: Office, volunteer: Volunteer, *, for_s: float | None = None, reason: str = "nonsense") -> None:
    since_s = START_WALL_S + office.time.now_s
    row = BanRow(
        peer=volunteer.peer, since_s=since_s, until_s=None if for_s is None else since_s + for_s, reason=reason
    )
    await office.services.database.run(add_ban, row)
    await office.tick(1.0)


def listed(office: Office) -> tuple[PeerId, ...]:
    newest = office.services.bans.newest
    if newest is None:
        return ()
    found = unseal(newest, REVOCATION_CONTEXT, Revocations, signer=KEY.peer_id)
    assert (found.run, found.number) == (office.manifest.run_id, office.services.bans.number)
    return found.peers


async def events(office: Office) -> list[tuple[str, PeerId | None]]:
    found = await office.services.database.run(lambda db: history.last_events(db, limit=20))
    return [(event.kind, event.peer) for event in reversed(found) if "ban" in event.kind]


async def test_who_is_banned_hears_why_and_everybody_else_gets_the_list(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        for volunteer in (A, B):
            await office.join(volunteer)
            await office.beat(volunteer, state(0))
        await office.tick()
        assert (await office.beat(A, state(0))).revoked is None
        await ban(office, B)
        assert listed(office) == (B.peer,)
        for attempt in (lambda: office.beat(B, state(0)), lambda: office.join(B)):
            with pytest.raises(RefusedError, match="banned until the organiser takes it back: nonsense"):
                await attempt()
        reply: BeatReply = await office.beat(A, state(0))
        assert reply.revoked == office.services.bans.newest
        assert (await office.beat(A, state(0), revocations=office.services.bans.number)).revoked is None, "it has it"
        assert [peer.peer for peer in office.services.registry.live()] == [A.peer]
        assert await events(office) == [("peer.banned", B.peer)]


async def test_a_ban_ends_by_itself_or_is_taken_back(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await ban(office, A, for_s=60.0)
        await ban(office, B)
        assert listed(office) == tuple(sorted((A.peer, B.peer)))
        await office.tick(60.0)
        assert listed(office) == (B.peer,)
        await office.join(A)
        await office.services.database.run(remove_ban, B.peer)
        await office.tick(1.0)
        assert listed(office) == ()
        await office.join(B)
        assert await events(office) == [
            ("peer.banned", A.peer),
            ("peer.banned", B.peer),
            ("peer.unbanned", A.peer),
            ("peer.unbanned", B.peer),
        ]


async def test_a_restart_keeps_the_banned_out_from_its_first_moment(tmp_path: Path) -> None:
    """Hashing a checkpoint may take minutes before the first tick. Numbers go on: peers take no list twice."""
    time = StoppedTime()
    async with open_office(tmp_path, time=time) as office:
        await ban(office, A)
        number = office.services.bans.number
    async with open_office(tmp_path, time=time) as office:
        with pytest.raises(RefusedError):
            await office.join(A)
        await office.tick(1.0)
        assert (listed(office), office.services.bans.number) == ((A.peer,), number), "nothing has changed"
        await ban(office, B)
        assert office.services.bans.number > number
        assert await events(office) == [("peer.banned", A.peer), ("peer.banned", B.peer)]


async def test_who_slipped_in_is_put_out_at_the_next_tick(tmp_path: Path) -> None:
    """The coordinator was killed between its list and what follows from it."""
    async with open_office(tmp_path) as office:
        await office.join(A)
        await office.beat(A, state(0))
        await ban(office, A)
        office.services.registry.everybody()[0].presence = "live"
        await office.tick(1.0)
        assert office.services.registry.live() == ()


async def test_a_list_that_is_made_after_a_backup_is_newer(tmp_path: Path) -> None:
    """The directory was copied, and peers have heard of bans since. Oracle: the numbers."""
    time = StoppedTime()
    for name in "ab":
        (tmp_path / name).mkdir()
    async with open_office(tmp_path / "a", time=time) as office:
        for _ in range(5):
            await ban(office, A)
            await office.services.database.run(remove_ban, A.peer)
            await office.tick(1.0)
        known = office.services.bans.number
    async with open_office(tmp_path / "b", time=time) as office:
        await ban(office, B)
        assert office.services.bans.number > known


async def test_a_database_that_cannot_be_read_for_a_moment_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_office(tmp_path) as office:
        await ban(office, A)

        async def locked() -> None:
            raise StorageError("the database is locked.")

        with monkeypatch.context() as patch:
            patch.setattr(office.services.bans, "_read", locked)
            await office.tick(1.0)
        assert listed(office) == (A.peer,)


async def test_more_bans_than_a_list_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest are on the list; the coordinator keeps all of them out."""
    monkeypatch.setattr(bans, "MAX_REVOKED", 1)
    async with open_office(tmp_path) as office:
        await ban(office, A)
        office.time.advance(5.0)
        await ban(office, B)
        assert listed(office) == (B.peer,)
        with pytest.raises(RefusedError):
            await office.join(A)
        assert await events(office) == [("peer.banned", A.peer), ("peer.banned", B.peer)]


# -- commands -------------------------------------------------------------------------------------------


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(coordinator, [str(word) for word in arguments])


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """Make a run directory that two peers have joined, one of them twice under another id."""

    async def join(volunteers: Callable[[Office], Awaitable[None]]) -> None:
        async with open_office(tmp_path) as office:
            await volunteers(office)

    async def both(office: Office) -> None:
        await office.join(A, name="oak")
        await office.join(B, name="elm")
        await office.join(Volunteer("c"), name="elm")

    asyncio.run(join(both))
    return tmp_path


def test_a_peer_is_banned_and_let_in_again_by_name(served: Path) -> None:
    assert call("ban", served, "oak", "--for", "7d", "--reason", "sends nonsense").exit_code == 0
    (row,) = json.loads(call("bans", served, "--json").stdout)["data"]["bans"]
    assert (row["peer"], row["reason"]) == (A.peer, "sends nonsense")
    assert row["until_s"] - row["since_s"] == 7 * 86_400
    assert A.peer in call("bans", served).stdout
    assert json.loads(call("unban", served, A.peer, "--json").stdout)["data"]["peer"] == A.peer
    assert json.loads(call("bans", served, "--json").stdout)["data"]["bans"] == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("ban", "ash"), "no peer 'ash' ever took part"),
        (("ban", "elm"), "2 peers are called 'elm'"),
        (("ban", "oak", "--for", "soon"), "'soon' is no time"),
        (("ban", "oak", "--for", "0d"), "'0d' is no time"),
        (("ban", "oak", "--reason", "x" * 201), "at most 200"),
        (("ban", "oak", "--reason", "a\nb"), "printable"),
        (("unban", "oak"), "oak is not banned"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[:20].replace("\n", " "),
)
def test_what_cannot_be_is_one_line_and_changes_nothing(served: Path, arguments: tuple[str, ...], text: str) -> None:
    command, *rest = arguments
    result = call(command, served, *rest)
    assert (result.exit_code, len(result.stderr.strip().splitlines())) == (3, 1), result.output
    assert text in result.stderr
    assert json.loads(call("bans", served, "--json").stdout)["data"]["bans"] == []


def test_who_has_never_come_can_be_kept_out_by_its_id(served: Path) -> None:
    peer = Volunteer("nobody yet").peer
    assert call("ban", served, peer).exit_code == 0
    (row,) = json.loads(call("bans", served, "--json").stdout)["data"]["bans"]
    assert row["peer"] == peer


def test_a_folder_without_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    for command in (("ban", tmp_path, "oak"), ("unban", tmp_path, "oak"), ("bans", tmp_path)):
        assert call(*command).exit_code == 3
    assert list(tmp_path.iterdir()) == []
