"""The layers hold, and the contracts that say so can fail.

Oracles: import-linter on the real tree, and on small trees with one broken rule each; for the rules that
it cannot see, the syntax trees of our own files.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("protocol", "peer", "coordinator")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
RUNS_FOREIGN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}

KEPT_TREE = {
    "protocol/__init__.py": "",
    "protocol/wire.py": "import msgpack",
    "protocol/transport/__init__.py": "",
    "protocol/transport/node.py": "import hivemind.dht\nfrom hivemind.p2p import P2P",
    "peer/__init__.py": "",
    "peer/app.py": "import protocol.wire\nimport peer.engine.step",
    "peer/engine/__init__.py": "",
    "peer/engine/step.py": "import torch\nimport bitsandbytes.optim",
    "peer/pipeline/__init__.py": "",
    "peer/pipeline/compute.py": "import peer.engine.step",
    "peer/memory/__init__.py": "",
    "peer/memory/pool.py": "import torch",
    "peer/model/__init__.py": "",
    "peer/codecs/__init__.py": "",
    "peer/averaging/__init__.py": "",
    "peer/averaging/reduce.py": "import torch.nn\nfrom hivemind.averaging import allreduce",
    "coordinator/__init__.py": "",
    "coordinator/app.py": "import protocol.wire\nimport coordinator.store.writer",
    "coordinator/store/__init__.py": "",
    "coordinator/store/writer.py": "import sqlite3",
}


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Check the packages under `root` against the contracts of the pyproject.toml there."""
    code = "from importlinter.cli import lint_imports_command as main; main(['--no-cache', '--no-logo'])"
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    (root / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())


def test_contracts_hold_in_this_tree() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 5 kept, 0 broken." in done.stdout


def test_contracts_allow_what_the_design_allows(tmp_path: Path) -> None:
    write_tree(tmp_path, KEPT_TREE)
    done = lint_imports(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("protocol/wire.py", "import peer.app", "peer and coordinator stand on protocol"),
        ("coordinator/app.py", "from peer.engine import step", "peer and coordinator stand on protocol"),
        ("peer/app.py", "import coordinator.app", "peer and coordinator stand on protocol"),
        ("protocol/transport/node.py", "import torch", "torch stays"),
        ("peer/app.py", "from torch import nn", "torch stays"),
        ("coordinator/app.py", "import bitsandbytes", "torch stays"),
        ("protocol/wire.py", "from hivemind.dht import DHT", "hivemind stays"),
        ("peer/engine/step.py", "import hivemind", "hivemind stays"),
        ("coordinator/store/writer.py", "def late():\n    import hivemind.p2p", "hivemind stays"),
        ("peer/memory/pool.py", "import peer.engine.step", "averaging, pipeline, engine"),
        ("peer/app.py", "import sqlite3", "SQL stays"),
        ("coordinator/app.py", "from sqlite3 import connect", "SQL stays"),
    ],
)
def test_contract_breaks_on(tmp_path: Path, module: str, line: str, contract: str) -> None:
    """One forbidden import in a tree that otherwise holds breaks exactly its own contract."""
    write_tree(tmp_path, KEPT_TREE | {module: KEPT_TREE[module] + "\n" + line})
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    verdicts = [text for text in done.stdout.splitlines() if text.split("(")[0].rstrip().endswith(("KEPT", "BROKEN"))]
    broken = [text for text in verdicts if "BROKEN" in text]
    assert len(verdicts) == 5
    assert [text.startswith(contract) for text in broken] == [True]


def test_every_file_says_what_it_is() -> None:
    silent = [str(path.relative_to(ROOT)) for path in SOURCES + TESTS if not says_what_it_is(path)]
    assert not silent, f"no module docstring: {silent}"


def says_what_it_is(path: Path) -> bool:
    """A file needs a docstring; an empty `__init__.py` is only a marker."""
    text = path.read_text(encoding="utf-8")
    return (path.name == "__init__.py" and not text.strip()) or bool(ast.get_docstring(ast.parse(text)))


def test_no_module_has_a_name_that_says_nothing() -> None:
    named = {path: {path.stem, *path.relative_to(ROOT).parent.parts} for path in SOURCES + TESTS}
    assert not [str(path.relative_to(ROOT)) for path, parts in named.items() if parts & BANNED_NAMES]


def test_nothing_decodes_bytes_by_running_code() -> None:
    """Bytes from strangers, and files that bytes from strangers became, must never be able to run as code."""
    found = [f"{path.relative_to(ROOT)}: {what}" for path in SOURCES for what in foreign_code(path.read_text("utf-8"))]
    assert not found


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "eval('1')", "exec('1')"],
)
def test_foreign_code_is_recognised(text: str) -> None:
    assert list(foreign_code(text))


def foreign_code(text: str) -> Iterator[str]:
    """Yield what in a source text could run code that came as data."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from sorted({alias.name.split(".")[0] for alias in node.names} & RUNS_FOREIGN_CODE)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in RUNS_FOREIGN_CODE:
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "eval", "exec"}:
            yield ast.unparse(node.func)
