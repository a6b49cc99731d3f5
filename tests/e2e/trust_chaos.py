"""Kill -9 the coordinator at any moment while receipts come in and are settled; nobody may lose or gain a credit.

    python -m tests.e2e.trust_chaos [--kills 100] [--seed 0]        (make chaos-trust)

Three peers that only talk hand in the receipts of many rounds: closings, both ends of every hop, some of them late,
some said twice, one contradicted. They repeat what was not acknowledged, with the queue and the spool of real peers.
The coordinator's services, on the real SQLite, are a process of their own that is killed again and again, at moments
drawn uniformly, its first milliseconds included. In the end the book must say, entry by entry summed up, what it says
after the same receipts and no kill.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import select
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing as shutting
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.store.database import DATABASE_FILE, open_readonly
from peer.report_spool import ReportSpool
from peer.reports import ReportQueue
from protocol.control import Beat, BeatReply, PeerState, ReceiptReport, Report
from protocol.ids import StageId
from protocol.manifest import Manifest
from protocol.rounds.messages import Credit
from tests.coordinator.office import Office, Volunteer, closing, closing_report, open_office, sign_closing
from tests.protocol.hops import hop, signed_window
from tests.protocol.manifests import batch_spec, manifest

FEEDER, MIDDLE, LATE = Volunteer("feeder"), Volunteer("middle"), Volunteer("late")
EVERYBODY = (FEEDER, MIDDLE, LATE)
NUMBERS = 4
TOKENS = 64
MAX_LIFE_S = 0.25
GIVE_UP_S = 60.0
_FRAME = struct.Struct(">BI")

Book = dict[tuple[Any, ...], int]


@dataclass(slots=True)
class ChaosReport:
    """What the kills have hit."""

    kills: int = 0
    unanswered: int = 0
    """Kills that took the answer to a beat with them."""
    book: Book = field(default_factory=dict)


def run(folder: Path, *, kills: int, rounds: int, seed: int, say: Callable[[str], None]) -> ChaosReport:
    """Hand in `rounds` rounds under `kills` kills; raises `AssertionError` if the book differs from a quiet one."""
    quiet = ChaosReport()
    _hand_in(folder / "quiet", rounds, quiet, next_kill_s=iter(()))
    dice = random.Random(seed)
    report = ChaosReport()
    _hand_in(folder / "chaos", rounds, report, next_kill_s=(dice.uniform(0, MAX_LIFE_S) for _ in range(kills)))
    assert report.kills == kills, f"all was handed in after {report.kills} kills: take more rounds"
    assert quiet.book, "nothing was booked at all"
    assert report.book == quiet.book, f"differ: {sorted(report.book.items() ^ quiet.book.items(), key=str)[:10]}"
    say(f"{report.kills} kills, {report.unanswered} in the middle of a beat; {len(quiet.book)} sums are the same")
    return report


# -- what peers say -----------------------------------------------------------------------------------


def _run(rounds: int) -> Manifest:
    return manifest(batch=batch_spec(num_rounds=rounds, eval_every=1 << 20))


def _speech(run_: Manifest, round_id: int) -> Iterator[tuple[Volunteer, Report]]:
    """Say what a round's three peers report of it."""
    half = NUMBERS // 2
    credits = tuple(
        Credit(stage=StageId(stage), peer=who.peer, tokens=share * TOKENS)
        for who, stage, share in ((FEEDER, 0, NUMBERS), (MIDDLE, 1, half), (LATE, 1, NUMBERS - half))
    )
    done = closing(run_, round_id).model_copy(update={"credits": credits})
    for who in EVERYBODY:  # as it comes with everybody's commits
        yield who, closing_report(sign_closing(FEEDER, done))
    hops = [hop(number, FEEDER.peer, (MIDDLE if number < half else LATE).peer) for number in range(NUMBERS)]
    denied = hop(NUMBERS - 1, FEEDER.peer, LATE.peer, returned=9)
    said = ((FEEDER, hops), (MIDDLE, hops[:half]), (LATE, [*hops[half:-1], denied]))
    for session in (1, 2):  # the second time is a repetition under another name
        for who, mine in said:
            window = signed_window(who.key, *mine, run=run_.run_id, round_id=round_id, session=session)
            yield who, ReceiptReport(window=window)


# -- handing it in ------------------------------------------------------------------------------------


def _hand_in(folder: Path, rounds: int, report: ChaosReport, *, next_kill_s: Iterator[float]) -> None:
    folder.mkdir(parents=True)
    asyncio.run(_found(folder, rounds))
    queues = {who.name: ReportQueue(ReportSpool(folder / who.name)) for who in EVERYBODY}
    for round_id in range(rounds):
        for who, said in _speech(_run(rounds), round_id):
            if who.name != LATE.name:
                queues[who.name].add(said)
    for round_id in range(rounds):  # this one was cut off all the time, and hands everything in at the end
        for who, said in _speech(_run(rounds), round_id):
            if who.name == LATE.name:
                queues[who.name].add(said)
    child = _Child(folder, rounds)
    give_up_s = time.monotonic() + GIVE_UP_S + 2 * MAX_LIFE_S * rounds
    kill_s = next(next_kill_s, None)
    born_s = time.monotonic()
    try:
        while any(len(queue) for queue in queues.values()):
            assert time.monotonic() < give_up_s, "the receipts were not taken in time"
            for index, who in enumerate(EVERYBODY):
                reports = queues[who.name].oldest()[
                    :1
                ]  # in small bites, so that there are many moments to be killed in
                beat = Beat(state=PeerState.TRAINING, addresses=(), stages=(), reports=reports)
                left_s = None if kill_s is None else max(0.0, born_s + kill_s - time.monotonic())
                answer = child.ask(index, beat, patience_s=left_s)
                if answer is not None:
                    queues[who.name].acknowledge(answer.acknowledged)
                    continue
                child.kill()
                report.kills += 1
                report.unanswered += 1
                child, kill_s, born_s = _Child(folder, rounds), next(next_kill_s, None), time.monotonic()
    finally:
        child.finish()
    with shutting(open_readonly(folder / DATABASE_FILE)) as db:
        rows = db.execute(
            "SELECT kind, round, stage, peer, sum(tokens), sum(mflop) FROM credit_entries "
            "GROUP BY kind, round, stage, peer"
        ).fetchall()
        disputes = db.execute("SELECT round, number, quarrel FROM disputes").fetchall()
        evidence = db.execute("SELECT peer, subject FROM evidence").fetchall()
    report.book = {tuple(row[:5]): row[5] for row in rows}
    report.book |= {("dispute", *row): 1 for row in disputes} | {("evidence", *row): 1 for row in evidence}


async def _found(folder: Path, rounds: int) -> None:
    async with open_office(folder, run=_run(rounds)) as office:
        for who in EVERYBODY:
            await office.join(who)


class _Child:
    """The coordinator's services in a process that is forked from this one, and may be killed."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self._ours, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                self._ours.close()
                asyncio.run(_serve(folder, rounds, theirs))
                code = 0
            finally:
                os._exit(code)
        theirs.close()

    def ask(self, who: int, beat: Beat, *, patience_s: float | None) -> BeatReply | None:
        """Return the answer to a beat, or None if there was none in time."""
        data = beat.to_bytes()
        self._ours.sendall(_FRAME.pack(who, len(data)) + data)
        header = self._read(_FRAME.size, patience_s)
        body = None if header is None else self._read(_FRAME.unpack(header)[1], patience_s)
        return None if body is None else BeatReply.from_bytes(body)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._ours.close()

    def finish(self) -> None:
        """Let it settle what is left, and end."""
        self._ours.shutdown(socket.SHUT_WR)
        _, status = os.waitpid(self._pid, 0)
        self._ours.close()
        assert os.waitstatus_to_exitcode(status) == 0, "the coordinator did not end well"

    def _read(self, count: int, patience_s: float | None) -> bytes | None:
        data = b""
        until_s = None if patience_s is None else time.monotonic() + patience_s
        while len(data) < count:
            left_s = GIVE_UP_S if until_s is None else max(0.0, until_s - time.monotonic())
            if not select.select([self._ours], [], [], left_s)[0]:
                return None
            piece = self._ours.recv(count - len(data))
            assert piece, "the coordinator died by itself"
            data += piece
        return data


async def _serve(folder: Path, rounds: int, wire: socket.socket) -> None:
    """Answer beats until the other end closes; settle after each, so that kills hit that too."""
    reader, writer = await asyncio.open_connection(sock=wire)
    async with open_office(folder, run=_run(rounds)) as office:
        while True:
            try:
                who, count = _FRAME.unpack(await reader.readexactly(_FRAME.size))
            except asyncio.IncompleteReadError:
                break
            reply = await office.services.registry.beat(
                EVERYBODY[who].peer, Beat.from_bytes(await reader.readexactly(count))
            )
            await _settle(office)
            data = reply.to_bytes()
            writer.write(_FRAME.pack(who, len(data)) + data)
            await writer.drain()
        await office.services.credits.settle_rest()
    writer.close()


async def _settle(office: Office) -> None:
    await office.services.credits.settle_due(quiet_since_s=float("inf"), waiting_since_s=float("inf"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `make chaos-trust`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    choices = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="handcar-chaos-") as folder:
        run(Path(folder), kills=choices.kills, rounds=16 * choices.kills, seed=choices.seed, say=print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
