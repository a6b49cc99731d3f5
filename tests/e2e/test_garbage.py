"""Members who talk nonsense to every handler of a coordinator and of peers, while these train.

Nobody may die of it, hold on to memory or file descriptors for it, or lose a round over it. Which handlers there
are, the processes themselves say in their logs, so that a new one cannot be forgotten here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import psutil
import pytest

from coordinator.store import peers
from protocol import control, history, hops
from protocol.batches import TaskKind
from protocol.hops import OpenTask, ResumeTask, TensorSpec
from protocol.ids import Digest, Lineage, PeerId, RoundId, RunId, StageId, Version
from protocol.invite import Invite
from protocol.records import admit
from protocol.rounds import messages as rounds
from protocol.transport.blobs import RangeRequest
from protocol.transport.passes import ShowPass
from protocol.wire import PROTOCOL_VERSION, Message, pack_tagged
from tests.e2e.attacker import Attacker, attacker, dht_nonsense, framed, framed_nonsense, reduce_nonsense
from tests.e2e.processes import Command
from tests.e2e.swarm import Swarm

pytestmark = pytest.mark.timeout(240)

ROUNDS = 20_000  # the run is not meant to end
SETTINGS = ("batch.eval_every=1000", "keeping.checkpoint_every=1000")
SEED = 20261123
PASSES = 3
AT_ONCE = 24  # streams
MOST_MORE_BYTES = 96 << 20  # by which a process and its p2pd may grow under attack: p2pd alone needs about 40 MB for it
MOST_MORE_FILES = 20
CALM_S = 30.0


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Swarm]:
    with Swarm(tmp_path_factory.mktemp("garbage"), corpus=corpus, rounds=ROUNDS, settings=SETTINGS) as swarm:
        swarm.start_coordinator("--start-peers", "3")
        swarm.start_peers(["p0", "p1", "p2"])
        swarm.wait_version(3, stage=0)
        swarm.wait_version(3, stage=1)
        yield swarm


@pytest.mark.parametrize("who", ["coordinator", "p0", "p1"])
async def test_nonsense_on_every_handler_changes_nothing(swarm: Swarm, who: str) -> None:
    victim = swarm.coordinator if who == "coordinator" else swarm.peers[who]
    assert victim is not None
    handlers = {event["name"] for event in victim.events("handler.added")}
    assert _kinds(handlers) == COORDINATORS if who == "coordinator" else _kinds(handlers) == PEERS
    addresses = _addresses(swarm, victim)
    async with attacker(addresses, seed=SEED) as stranger:
        await _get_in(stranger, handlers, swarm)
        await _attack(stranger, handlers, swarm)  # buffers and pools reach the size that they keep
        before = _footprint(victim)
        for _ in range(PASSES):
            await _attack(stranger, handlers, swarm)
        assert stranger.sent > PASSES * len(handlers) * 20
        assert stranger.answered > 0, "not one of them came through"
    version, rounds_closed = swarm.version(1), len(swarm.rounds())
    await asyncio.to_thread(swarm.wait_version, version + 5, stage=1, timeout_s=CALM_S)
    await asyncio.to_thread(
        swarm.wait, "the ledger", lambda: len(swarm.rounds()) >= rounds_closed + 5, timeout_s=CALM_S
    )
    assert victim.code is None
    after = _footprint(victim)
    assert after[0] - before[0] < MOST_MORE_BYTES, (before, after)
    assert after[1] - before[1] < MOST_MORE_FILES, (before, after)
    assert not victim.events("task.failed")
    tokens = swarm.run_dir().manifest.batch.tokens_per_round
    tallies = swarm.rounds()
    assert [tally.round for tally in tallies] == list(range(len(tallies)))
    assert {(tally.tokens, tally.tasks_lost) for tally in tallies} == {(tokens, 0)}


async def _get_in(stranger: Attacker, handlers: set[str], swarm: Swarm) -> None:
    """Show a genuine pass: without one, nonsense would get no further than the door."""
    run = swarm.run_dir()
    me, now_s = PeerId(stranger.p2p.peer_id.to_base58()), int(time.time())
    admission = admit(run.key, run=run.manifest.run_id, peer=me, name="attacker", issued_s=now_s, valid_hours=1.0)
    (name,) = (name for name in handlers if _kind(name) == "call")
    answered = stranger.answered
    await stranger.stream(name, framed(pack_tagged(ShowPass(admission=admission, number=0))))
    assert stranger.answered > answered


# What a member can reach, by the last part of a handler's name.
DHT = {"rpc_ping", "rpc_store", "rpc_find"}
COORDINATORS = DHT | {"call", "blob"}
PEERS = DHT | {"call", "blob", "hop", "rpc_aggregate_part"}


def _kinds(handlers: set[str]) -> set[str]:
    return {_kind(name) for name in handlers}


def _kind(handler: str) -> str:
    return handler.replace(".", "/").rpartition("/")[2]


async def _attack(stranger: Attacker, handlers: set[str], swarm: Swarm) -> None:
    slots = asyncio.Semaphore(AT_ONCE)

    async def say(name: str, data: bytes) -> None:
        async with slots:
            await (stranger.unary(name, data) if _kind(name) in DHT else stranger.stream(name, data))

    everything = [(name, data) for name in sorted(handlers) for data in _nonsense(stranger, name, swarm)]
    stranger.random.shuffle(everything)
    await asyncio.gather(*(say(name, data) for name, data in everything))


def _nonsense(stranger: Attacker, handler: str, swarm: Swarm) -> Iterator[bytes]:
    chance = stranger.random
    run = swarm.run_dir().manifest.run_id
    match _kind(handler):
        case "call":
            honest = (history.StateRequest(stage=StageId(0)), control.StatusRequest(), control.Leave(reason="bye"))
            modules = (control, history, rounds)
            kinds = list(chain.from_iterable(_messages_in(vars(module).values()) for module in modules))
            return framed_nonsense(honest, kinds, chance)
        case "blob":
            wants = (
                RangeRequest(name="tokens/train.bin/0", offset=1 << 62, length=1),
                RangeRequest(name="../" * 60 + "etc/passwd", offset=0, length=100),
                RangeRequest(name="state/0/" + "9" * 180 + "/weights", offset=0, length=8 << 20),
            )
            return framed_nonsense(wants, [RangeRequest], chance)
        case "hop":
            return framed_nonsense(_hops(run), _messages_in(vars(hops).values()), chance)
        case "rpc_aggregate_part":
            return reduce_nonsense(chance)
        case dht:
            return dht_nonsense(dht, chance)


def _messages_in(values: Iterable[object]) -> list[type[Message]]:
    return [one for one in values if isinstance(one, type) and issubclass(one, Message) and one is not Message]


def _hops(run: RunId) -> tuple[Message, ...]:
    """Tasks of the right run with impossible bodies, and the end of one that nobody began."""

    def task(shape: tuple[int, ...], body_bytes: int, time_left_s: float) -> OpenTask:
        return OpenTask(
            protocol=PROTOCOL_VERSION,
            run=run,
            kind=TaskKind.TRAIN,
            round=RoundId(1),
            number=0,
            attempt=0,
            stage=StageId(1),
            lineage=Lineage(bytes(32)),
            version=Version(1),
            local_step=0,
            time_left_s=time_left_s,
            retries_left=9,
            tensors=(TensorSpec(name="hidden", shape=shape),),
            codec="fp32",
            body_bytes=body_bytes,
        )

    resume = ResumeTask(
        run=run, kind=TaskKind.TRAIN, round=RoundId(1), number=0, stage=StageId(1), body_digest=Digest(bytes(32))
    )
    return task((1 << 20, 1 << 4, 64), 1 << 32, 10.0), task((2, 32, 64), 2 * 32 * 64 * 4, 1e6), resume


def _addresses(swarm: Swarm, victim: Command) -> tuple[str, ...]:
    if victim is swarm.coordinator:
        return Invite.from_text(swarm.invite).addresses
    with swarm.database() as db:
        return next(peer.addresses for peer in peers.load_peers(db) if peer.name == victim.name)


def _footprint(victim: Command) -> tuple[int, int]:
    """Return the memory (bytes) and the open files of a process and its p2pd."""
    process = psutil.Process(victim.pid)
    everybody = [process, *process.children(recursive=True)]
    return sum(one.memory_info().rss for one in everybody), sum(one.num_fds() for one in everybody)
