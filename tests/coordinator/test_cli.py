"""The commands: fast help, one line per error, the right exit code.

Oracles: the table of exit codes in the documentation of errors; the modules that a `--help` has loaded.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from coordinator.cli import coordinator
from coordinator.commandline import parse_settings
from coordinator.monitor.cli import swarm
from coordinator.rollback import WISH
from coordinator.store.database import DATABASE_FILE, Database, reading
from coordinator.store.peers import get_setting
from protocol.errors import ConfigError
from protocol.ids import RoundId
from tests.coordinator.runs import make_run, random_weights, stage_files, write_prose

COMMANDS = (
    "init",
    "run",
    "invite",
    "checkpoints",
    "rollback",
    "export",
    "demo",
    "plan",
    "invites",
    "uninvite",
    "ban",
    "unban",
    "bans",
)


def call(*arguments: str | Path, program: object = coordinator) -> Result:
    return CliRunner().invoke(program, [str(word) for word in arguments])  # type: ignore[arg-type]


def assert_one_line(result: Result, exit_code: int, text: str) -> None:
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert text in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_shows_an_example(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) <= 40
    assert f"coordinator {command}" in result.output.split("Example:")[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "coordinator.cli", "--help"),
        ("-m", "coordinator.cli", "run", "--help"),
        ("-m", "coordinator.monitor.cli", "status", "--help"),
    ],
)
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    """Oracle: Python's own list of imports."""
    heavy = ("torch", "hivemind", "transformers", "tokenizers", "numpy", "pydantic_settings")
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert imported.isdisjoint(heavy)


def test_init_makes_a_run_and_says_what_to_do_next(tmp_path: Path) -> None:
    text = write_prose(tmp_path / "text.txt", chars=60_000)
    result = call(
        "init", tmp_path / "run", "--corpus", text, "--preset", "tiny", "--set", "batch.eval_every=3", "--json"
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["schema"], said["ok"]) == ("coordinator.init/1", True)
    assert f"coordinator run {tmp_path / 'run'}" in result.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["run"], manifest["batch"]["eval_every"]) == (said["data"]["run"], 3)


def test_mistakes_of_init_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    text = write_prose(tmp_path / "text.txt", chars=60_000)
    (tmp_path / "empty.txt").touch()
    run = tmp_path / "run"
    for arguments, word in (
        ((), "E-CFG"),
        (("--corpus", tmp_path / "missing"), "E-DATA"),
        (("--corpus", tmp_path / "empty.txt"), "E-DATA"),
        (("--corpus", text, "--preset", "huge"), "E-CFG"),
        (("--corpus", text, "--preset", "tiny", "--stages", "99"), "E-MODEL"),
        (("--corpus", text, "--set", "nonsense"), "E-CFG"),
        (("--corpus", text, "--rounds", "9" * 20), "E-CFG"),
        (("--corpus", text, "--set", f"batch.num_rounds={'9' * 20}"), "E-CFG"),
        (("--corpus", text, "--seed", "9" * 23), "E-CFG"),
    ):
        assert_one_line(call("init", run, *arguments), 3, word)
        assert not run.exists()


@pytest.mark.parametrize("command", [("run",), ("invite",), ("checkpoints",), ("export", "--to", "model")])
def test_a_directory_without_a_run_is_refused(command: tuple[str, ...], tmp_path: Path) -> None:
    name, *rest = command
    assert_one_line(call(name, tmp_path, *rest), 3, "E-CFG")


def test_a_bad_flag_value_is_named(tmp_path: Path) -> None:
    assert_one_line(call("run", tmp_path, "--lost-after", "-1"), 3, "--lost-after: ")
    assert call("run", tmp_path, "--start-peers", "many").exit_code == 2


def test_an_environment_variable_is_read_and_a_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    from coordinator.settings import read_settings

    monkeypatch.setenv("SWARM_START_PEERS", "5")
    assert read_settings().start_peers == 5
    assert read_settings(start_peers=2).start_peers == 2
    monkeypatch.setenv("SWARM_START_PEERS", "-5")
    with pytest.raises(ConfigError, match="start-peers"):
        read_settings()


def test_several_come_from_the_environment_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    from coordinator.settings import read_settings

    monkeypatch.setenv("SWARM_HOST_MADDRS", "/ip4/127.0.0.1/tcp/1, /ip4/127.0.0.1/tcp/2,")
    assert read_settings().host_maddrs == ("/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/2")
    monkeypatch.setenv("SWARM_WATCHERS", "owl")
    with pytest.raises(ConfigError, match=r"^--watcher: 'owl' is no peer id"):
        read_settings()


def test_checkpoints_lists_the_sound_and_the_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    weights = random_weights(run.manifest)
    for round_id in (2, 4):
        run.write_checkpoint(RoundId(round_id), stage_files(tmp_path / str(round_id), weights, version=round_id))
    damaged = run.path / "checkpoints" / "round-000004" / "stage-1.weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    result = call("checkpoints", run.path, "--json")
    rows = json.loads(result.stdout)["data"]["checkpoints"]
    assert [(row["round"], row["problem"] is None) for row in rows] == [(4, False), (2, True)]
    assert "sound" in call("checkpoints", run.path).stdout


def test_rollback_takes_a_sound_checkpoint_and_no_other(tmp_path: Path) -> None:
    """Oracle: what is written down for the coordinator, which does it."""
    run = make_run(tmp_path)
    assert_one_line(call("rollback", run.path, "--to", "2"), 3, "no checkpoint of round 2")
    weights = random_weights(run.manifest)
    for round_id in (2, 4):
        run.write_checkpoint(RoundId(round_id), stage_files(tmp_path / str(round_id), weights, version=round_id))
    assert_one_line(call("rollback", run.path, "--to", "2"), 3, "was never served")
    asyncio.run(_opened(run.path))
    damaged = run.path / "checkpoints" / "round-000004" / "stage-1.weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert call("rollback", run.path, "--to", "4").exit_code not in (0, 2)
    assert_one_line(call("rollback", run.path, "--to", "2", "--reason", "x\ny"), 3, "--reason")
    assert call("rollback", run.path, "--to", "-1").exit_code == 2
    with reading(run.path / DATABASE_FILE) as db:
        assert get_setting(db, WISH) is None
    result = call("rollback", run.path, "--to", "2", "--reason", "poisoned", "--json")
    assert json.loads(result.stdout)["data"] == {"round": 2}
    with reading(run.path / DATABASE_FILE) as db:
        assert json.loads(get_setting(db, WISH) or "") == {"round": 2, "reason": "poisoned"}


async def _opened(path: Path) -> None:
    await (await Database.open(path / DATABASE_FILE)).close()


def test_export_takes_the_newest_sound_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert_one_line(call("export", run.path, "--to", tmp_path / "model"), 3, "no sound checkpoint")
    weights = random_weights(run.manifest)
    run.write_checkpoint(RoundId(2), stage_files(tmp_path / "2", weights, version=2))
    result = call("export", run.path, "--to", tmp_path / "model", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["data"]
    assert (said["round"], Path(said["path"])) == (2, (tmp_path / "model").resolve())
    assert (tmp_path / "model" / "config.json").is_file()


def test_status_of_what_is_neither_invite_nor_run_is_one_line(tmp_path: Path) -> None:
    assert_one_line(call("status", tmp_path, program=swarm), 3, "holds no run")
    assert_one_line(call("status", "hello", program=swarm), 3, "E-INV")
    assert_one_line(call("status", "handcar1:hello", program=swarm), 3, "E-INV")
    assert_one_line(call("status", tmp_path / "missing", program=swarm), 3, "neither an invite nor")
    run = make_run(tmp_path)
    assert_one_line(call("status", run.path, program=swarm), 3, "ever started")


async def test_a_database_that_is_damaged_half_way_is_one_line(tmp_path: Path) -> None:
    """Oracle: garbage over the root page of one table; the schema and the others are sound."""
    run = make_run(tmp_path)
    path = run.path / DATABASE_FILE
    await (await Database.open(path)).close()
    with closing(sqlite3.connect(path)) as db:
        page_bytes = db.execute("PRAGMA page_size").fetchone()[0]
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'rounds'").fetchone()[0]
    with path.open("r+b") as file:
        file.seek((page - 1) * page_bytes)
        file.write(b"\xa5" * page_bytes)
    assert_one_line(call("status", run.path, program=swarm), 5, "E-DISK cannot read")


def test_settings_are_json_where_they_can_be_and_text_elsewhere() -> None:
    assert parse_settings(("a.b=3", "c.d=true", "e.f=int8", "g.h=1e-3")) == {
        "a.b": 3,
        "c.d": True,
        "e.f": "int8",
        "g.h": 1e-3,
    }
    with pytest.raises(ConfigError, match="not a setting"):
        parse_settings(("no equals sign",))
