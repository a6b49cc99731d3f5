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

from coordinator.cli import coordinator
from coordinator.store import history
from coordinator.store.bans import BanRow, add_ban, remove_ban
from protocol.access import REVOCATION_CONTEXT, Revocations
from protocol.control import BeatReply
from protocol.errors import RefusedError
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


def listed(office: Office) -> tuple[int, tuple[PeerId, ...]]:
    newest = office.services.bans.newest
    if newest is None:
        return 0, ()
    found = unseal(newest, REVOCATION_CONTEXT, Revocations, signer=KEY.peer_id)
    assert found.run == office.manifest.run_id
    return found.number, found.peers


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
        assert listed(office) == (1, (B.peer,))
        for attempt in (lambda: office.beat(B, state(0)), lambda: office.join(B)):
            with pytest.raises(RefusedError, match="banned until the organiser takes it back: nonsense"):
                await attempt()
        reply: BeatReply = await office.beat(A, state(0))
        assert reply.revoked == office.services.bans.newest
        assert (await office.beat(A, state(0), revocations=1)).revoked is None, "it has it"
        assert [peer.peer for peer in office.services.registry.live()] == [A.peer]
        assert await events(office) == [("peer.banned", B.peer)]


async def test_a_ban_ends_by_itself_or_is_taken_back(tmp_path: Path) -> None:
    async with open_office(tmp_path) as office:
        await ban(office, A, for_s=60.0)
        await ban(office, B)
        assert listed(office) == (2, tuple(sorted((A.peer, B.peer))))
        await office.tick(60.0)
        assert listed(office) == (3, (B.peer,))
        await office.join(A)
        await office.services.database.run(remove_ban, B.peer)
        await office.tick(1.0)
        assert listed(office) == (4, ())
        await office.join(B)
        assert await events(office) == [
            ("peer.banned", A.peer),
            ("peer.banned", B.peer),
            ("peer.unbanned", A.peer),
            ("peer.unbanned", B.peer),
        ]


async def test_a_restart_goes_on_with_the_next_number(tmp_path: Path) -> None:
    """Peers that have the list would not take another of the same number."""
    time = StoppedTime()
    async with open_office(tmp_path, time=time) as office:
        await ban(office, A)
    async with open_office(tmp_path, time=time) as office:
        assert listed(office) == (1, (A.peer,))
        await office.tick(1.0)
        assert listed(office)[0] == 1, "nothing has changed"
        with pytest.raises(RefusedError):
            await office.join(A)
        await ban(office, B)
        assert listed(office) == (2, tuple(sorted((A.peer, B.peer))))


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


def test_a_folder_without_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    for command in (("ban", tmp_path, "oak"), ("unban", tmp_path, "oak"), ("bans", tmp_path)):
        assert call(*command).exit_code == 3
    assert list(tmp_path.iterdir()) == []
