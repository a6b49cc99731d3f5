"""Settings that every test shares: no network, no chance, one thread, nothing left behind.

Owns: the environment of the test process (set before anything imports torch or transformers), the
hypothesis profile, the marks that follow from a test's place, what may run side by side, and the check for
left-over processes. Must not know: any part of Handcar.

`make test` has two workers (pytest-xdist). One of them gets every test that may start commands or measure something, as
one group: these run one after the other, as without workers. The other worker has meanwhile what uses the network, as
one group too, and then what only computes, file by file.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings

os.environ.update(
    HF_HUB_OFFLINE="1",  # no test may depend on a model hub
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",  # its thread pool warns about every process we start
)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or every command that a test starts compiles all modules anew
sys.dont_write_bytecode = False
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share few cores; also one summation order

faulthandler.register(signal.SIGUSR1)  # `kill -USR1` shows where a hanging run stands

settings.register_profile("handcar", derandomize=True, deadline=None, database=None)
settings.load_profile("handcar")

E2E = Path(__file__).parent / "e2e"
COMPUTING = (
    *("tests/peer/codecs/", "tests/peer/data/", "tests/peer/engine/", "tests/peer/memory/", "tests/peer/model/"),
    *("tests/protocol/rounds/", "tests/sim/"),
)
"""Where tests need nothing but a core and a folder."""
STARTING = ("tests/benchmarks/", "tests/e2e/")
"""Where they start whole commands, which take both cores."""
LAST_GRACE_S = 5.0  # a daemon that was told to stop may need a moment at the end of the session


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in tests/e2e, and skip what needs a GPU where there is none."""
    for item in items:
        if item.path.is_relative_to(E2E):
            item.add_marker(pytest.mark.e2e)
    needs_cuda = [item for item in items if item.get_closest_marker("cuda")]
    if needs_cuda and not _has_cuda():
        for item in needs_cuda:
            item.add_marker(pytest.mark.skip(reason="needs CUDA: no NVIDIA GPU here"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Share tests out by `group_of`."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Groups(LoadScopeScheduling):  # type: ignore[misc]  # untyped
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


def group_of(nodeid: str) -> str:
    """Return what a test may not be separated from: its file, or all that starts commands, or all the rest."""
    path = nodeid.partition("::")[0]
    if path.startswith(COMPUTING):
        return path
    return "commands" if path.startswith(STARTING) else "network"


def _has_cuda() -> bool:
    import torch  # here, because it is slow and few sessions ask

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def _own_user_directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep a test that forgets to name a directory away from the user's own files."""
    root = tmp_path_factory.mktemp("xdg")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("CACHE", "CONFIG", "DATA", "STATE"):
            patch.setenv(f"XDG_{kind}_HOME", str(root / kind.lower()))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_process_left_behind() -> Iterator[None]:
    """Fail the session if a process that a test started is still there at its end, and end it."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    ours = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs([child for child in ours if not _is_pythons_own(child)], timeout=LAST_GRACE_S)
    names = [f"{child.pid} {' '.join(_command(child))[:80]}" for child in alive]
    for child in alive:
        child.kill()
    assert not names, "the tests left processes behind:\n" + "\n".join(names)


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # it has just ended
        return []


def _is_pythons_own(process: psutil.Process) -> bool:
    """Tell the helper that multiprocessing keeps until the interpreter exits from what a test started."""
    return any("multiprocessing.resource_tracker" in word for word in _command(process))
