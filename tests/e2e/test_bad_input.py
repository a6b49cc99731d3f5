"""Mistakes and broken disks, against real commands: one clear line, the right exit code, nothing lost.

The mistakes of `coordinator init` are with its unit tests, where the same table of exit codes is the oracle; here
are one of each kind, and everything that takes a coordinator, a peer or a file system to go wrong.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coordinator.init import init_run
from coordinator.rundir import CHECKPOINTS, SIGNED_MANIFEST, TOKENS
from protocol.invite import Invite
from protocol.signing import SigningKey
from tests.e2e.processes import Command, Program
from tests.e2e.swarm import LOOPBACK, Swarm

pytestmark = pytest.mark.timeout(240)

REFUSAL_TIMEOUT_S = 60.0
FOREVER = 20_000  # rounds
PATIENCE_S = 90.0
SETTINGS = ("keeping.checkpoint_every=1000", "batch.eval_every=1000")
SLOW_ROUNDS = ("batch.microbatches_per_round=24", "keeping.checkpoint_every=2", "batch.eval_every=1000")
DISK_BYTES = 64 << 20
ONE_LINE = re.compile(r"(?P<program>[a-z ]+): (?P<code>E-[A-Z0-9-]+) \S.*\n")


class Bench:
    """A swarm of one stage and one peer that train on while others make their mistakes beside them."""

    def __init__(self, swarm: Swarm, folder: Path) -> None:
        self.swarm = swarm
        self.folder = folder
        self.tries = 0

    def refused(self, program: Program, *arguments: str | Path) -> tuple[int, str, str]:
        """Run a command that must fail, and return its exit code, its error's code, and its one line."""
        self.tries += 1
        name = f"try-{self.tries}"
        command = Command(program, [str(word) for word in arguments], name=name, folder=self.folder)
        try:
            code = command.wait_end(timeout_s=REFUSAL_TIMEOUT_S)
        finally:
            command.end()
        said = command.err.read_text(encoding="utf-8")
        found = ONE_LINE.fullmatch(said)
        assert found, f"exit code {code}; not one line:\n{said}"
        assert command.stdout() == ""
        return code, found["code"], said

    def join(
        self, invite: str, *flags: str, program: Program = "peer", oddity: tuple[str, ...] = ()
    ) -> tuple[int, str]:
        """Try to join, as a newcomer; return the exit code and the error's code."""
        data = ("--data-dir", str(self.folder / f"newcomer-{self.tries}"), "--listen", LOOPBACK)
        code, error, _ = self.refused(program, *oddity, "join", invite, *data)
        return code, error


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("mistakes")
    with Swarm(folder / "swarm", corpus=corpus, rounds=FOREVER, stages=1, settings=SETTINGS) as swarm:
        swarm.start_coordinator()
        swarm.start_peer("honest")
        swarm.wait_version(1)
        yield Bench(swarm, folder)


@pytest.fixture(autouse=True)
def _training_goes_on(bench: Bench) -> Iterator[None]:
    """Whatever somebody else got wrong, the swarm beside them has made progress and lost nothing."""
    before = bench.swarm.version()
    yield
    bench.swarm.wait_version(before + 1)
    assert bench.swarm.counters().tasks_lost == 0
    assert bench.swarm.counters().tokens_dropped == 0


# -- joining --------------------------------------------------------------------------------------------


def test_a_word_that_is_no_invite(bench: Bench) -> None:
    assert bench.join("magnet:?xt=urn:btih:0") == (3, "E-INV")


def test_an_invite_that_lost_its_end(bench: Bench) -> None:
    assert bench.join(bench.swarm.invite[:-7]) == (3, "E-INV")


def test_an_invite_with_a_changed_letter(bench: Bench) -> None:
    invite = bench.swarm.invite
    changed = "x" if invite[40] != "x" else "y"
    assert bench.join(invite[:40] + changed + invite[41:]) == (3, "E-INV")


def test_a_coordinator_that_is_not_there(bench: Bench) -> None:
    invite = Invite.from_text(bench.swarm.invite)
    nobody = tuple(_with_port(address, _free_port()) for address in invite.addresses)
    assert bench.join(invite.model_copy(update={"addresses": nobody}).to_text()) == (6, "E-NET-01")


def test_an_invite_with_another_coordinators_fingerprint(bench: Bench) -> None:
    """Somebody else answers at that address: nothing may be told to them, nothing taken from them."""
    invite = Invite.from_text(bench.swarm.invite)
    other = SigningKey.generate().peer_id
    addresses = tuple(address.replace(invite.coordinator, other) for address in invite.addresses)
    forged = invite.model_copy(update={"addresses": addresses, "coordinator": other})
    assert bench.join(forged.to_text()) == (3, "E-INV")


def test_a_clock_that_is_half_a_minute_ahead(bench: Bench) -> None:
    assert bench.join(bench.swarm.invite, program="odd-peer", oddity=("clock:30",)) == (5, "E-CLOCK")


def test_a_peer_of_another_protocol_version(bench: Bench) -> None:
    assert bench.join(bench.swarm.invite, program="odd-peer", oddity=("protocol:99",)) == (4, "E-VER")


def test_a_data_folder_that_cannot_be_written(bench: Bench) -> None:
    """A path below a file, since nothing is unwritable for root."""
    (bench.folder / "a-file").touch()
    flags = ("--data-dir", bench.folder / "a-file" / "data", "--listen", LOOPBACK)
    code, error, said = bench.refused("peer", "join", bench.swarm.invite, *flags)
    assert (code, error) == (5, "E-DISK")
    assert "--data-dir" in said


def test_a_data_folder_that_another_peer_uses(bench: Bench) -> None:
    used = ("--data-dir", bench.swarm.folder / "honest.data", "--listen", LOOPBACK)
    code, error, _ = bench.refused("peer", "join", bench.swarm.invite, *used)
    assert (code, error) == (5, "E-DISK")


def test_a_port_that_a_peer_cannot_have(bench: Bench) -> None:
    with _taken_port() as port:
        flags = ("--data-dir", bench.folder / "port", "--listen", f"/ip4/127.0.0.1/tcp/{port}")
        code, error, said = bench.refused("peer", "join", bench.swarm.invite, *flags)
    assert (code, error) == (5, "E-PORT")
    assert str(port) in said


def test_a_log_that_cannot_be_written(bench: Bench) -> None:
    code, error, _ = bench.refused("peer", "join", bench.swarm.invite, "--log-file", bench.folder / "none" / "log")
    assert (code, error) == (5, "E-DISK")


# -- making and serving a run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--corpus", "/nowhere/at/all"), "E-DATA"),
        (("--corpus", "{empty}"), "E-DATA"),
        (("--corpus", "{short}"), "E-DATA"),
        (("--corpus", "{corpus}", "--stages", "99"), "E-MODEL"),
    ],
    ids=["corpus missing", "corpus empty", "too few tokens", "more stages than layers"],
)
def test_a_run_that_cannot_be_made(
    bench: Bench, corpus: Path, tmp_path: Path, flags: tuple[str, ...], error: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("A handcar.")
    places = {"empty": tmp_path / "empty.txt", "short": tmp_path / "short.txt", "corpus": corpus}
    words = [word.format(**places) for word in flags]
    code, said_error, _ = bench.refused("coordinator", "init", tmp_path / "run", "--preset", "tiny", *words)
    assert (code, said_error) == (3, error)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def spare(tmp_path: Path, corpus: Path) -> Path:
    """A run that nobody serves."""
    init_run(tmp_path / "spare", corpus=[corpus], preset="tiny", stages=1)
    return tmp_path / "spare"


def test_a_token_file_with_a_flipped_byte(bench: Bench, spare: Path) -> None:
    _flip(spare / TOKENS / "train.bin", 1_000)
    code, error, said = bench.refused("coordinator", "run", spare, "--host-maddr", LOOPBACK)
    assert (code, error) == (3, "E-DATA")
    assert "train.bin is damaged: chunk 0" in said
    _flip(spare / TOKENS / "train.bin", 1_000)
    with _taken_port() as port:  # the mended one gets as far as the next mistake
        assert bench.refused("coordinator", "run", spare, "--host-maddr", f"/ip4/127.0.0.1/tcp/{port}")[0] == 5


def test_a_manifest_that_another_key_signed(bench: Bench, spare: Path) -> None:
    shutil.copyfile(bench.swarm.directory / SIGNED_MANIFEST, spare / SIGNED_MANIFEST)
    assert bench.refused("coordinator", "run", spare, "--host-maddr", LOOPBACK)[:2] == (3, "E-CFG")


def test_a_port_that_the_coordinator_cannot_have(bench: Bench, spare: Path) -> None:
    with _taken_port() as port:
        flags = ("--host-maddr", f"/ip4/127.0.0.1/tcp/{port}")
        code, error, said = bench.refused("coordinator", "run", spare, *flags)
    assert (code, error) == (5, "E-PORT")
    assert str(port) in said


def test_a_run_that_is_served_already(bench: Bench) -> None:
    flags = ("--host-maddr", LOOPBACK)
    assert bench.refused("coordinator", "run", bench.swarm.directory, *flags)[:2] == (5, "E-DISK")


# -- disks ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_truncated_checkpoint_and_a_rotten_token_chunk_cost_only_what_they_held(tmp_path: Path, corpus: Path) -> None:
    """Everything stops; then the newest checkpoint is short and the peer's copy of its text has a flipped byte.

    Oracle: the rounds that are committed after the restart, the tokens in the ledger.
    """
    with Swarm(tmp_path, corpus=corpus, rounds=FOREVER, stages=1, settings=SLOW_ROUNDS) as swarm:
        swarm.start_coordinator()
        peer = swarm.start_peer("p0")
        folder = swarm.run_dir().checkpoints
        swarm.wait("two checkpoints", lambda: len(folder.rounds()) >= 2)
        assert swarm.coordinator
        swarm.coordinator.kill()
        peer.kill()
        newest, before = folder.rounds()[:2]
        weights = swarm.directory / CHECKPOINTS / f"round-{newest:06d}" / "stage-0.weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        for kept in (swarm.folder / "p0.data").rglob("*.safetensors"):
            kept.unlink()  # it comes back with nothing of its own
        for tokens in (swarm.folder / "p0.data").rglob("train.bin"):
            _flip(tokens, 1_000)
        said_before = len(peer.events())

        swarm.start_coordinator("--lost-after", "5", again=True)  # so long it waits for more peers to report
        again = swarm.start_peer("p0")
        swarm.wait("a commit", lambda: _commits(again, said_before))
        assert _commits(again, said_before)[0] == before + 1
        swarm.wait("a newer checkpoint", lambda: folder.rounds()[0] > newest)
        assert any(event["kind"] == "checkpoint.damaged" for event in swarm.status()["events"])
        assert swarm.counters().tasks_lost == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, small enough to fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "handcar-test", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.long
def test_a_disk_that_is_full_while_checkpointing(tmp_path: Path, small_disk: Path, corpus: Path) -> None:
    """The coordinator's disk fills up: rounds go on, the older checkpoints stay sound; freed, it writes again."""
    with Swarm(tmp_path, corpus=corpus, rounds=FOREVER, stages=1, settings=SLOW_ROUNDS) as swarm:
        shutil.copytree(swarm.directory, small_disk / "run")
        swarm.directory = small_disk / "run"
        coordinator = swarm.start_coordinator()
        swarm.start_peer("p0")
        checkpoints = swarm.run_dir().checkpoints
        swarm.wait("a checkpoint", lambda: checkpoints.rounds())
        _fill(small_disk / "filler")
        swarm.wait(
            "a full disk", lambda: any("E-DISK" in one["detail"] for one in coordinator.events("checkpoint.failed"))
        )
        swarm.wait_version(swarm.version() + 5)
        assert swarm.run_dir().newest_checkpoint() is not None
        newest = checkpoints.rounds()[0]
        (small_disk / "filler").unlink()
        swarm.wait("a newer checkpoint", lambda: checkpoints.rounds()[0] > newest)
        version = swarm.version()
        swarm.wait("the ledger", lambda: swarm.rounds()[-1].round >= version)
        assert swarm.counters().tasks_lost == 0
        assert [tally.round for tally in swarm.rounds()] == list(range(len(swarm.rounds())))


def _commits(peer: Command, since: int) -> list[int]:
    return [event["version"] for event in peer.events()[since:] if event["event"] == "round.committed"]


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            while True:
                try:
                    file.write(bytes(size))
                except OSError:
                    break


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def _with_port(address: str, port: int) -> str:
    return re.sub(r"/tcp/\d+", f"/tcp/{port}", address)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def _taken_port() -> Iterator[int]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield int(one.getsockname()[1])
