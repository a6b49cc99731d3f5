"""What is installed, what is locked and what the commands promise fit together.

Oracles: pyproject.toml read as data, the lock read with the `packaging` library, the wheel that hatchling
builds, and the commands themselves run with stand-ins for what they call.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
RUNTIME = [Requirement(text) for text in PROJECT["dependencies"]]
DEV = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"]]
LOCK_LINES = [
    line
    for line in (ROOT / ".lock/constraints.txt").read_text(encoding="utf-8").splitlines()
    if line[:1] not in ("", "#")
]
LOCK = [Requirement(line) for line in LOCK_LINES]
TORCH = Requirement((ROOT / ".lock/torch.txt").read_text(encoding="utf-8").strip())
PACKAGES = ("coordinator", "peer", "protocol")
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "peer",
    "coordinator",
    "protocol",
    "tests",
    "docker",
    "docs",
    "Makefile",
    "LICENSE",
}
TARGETS = ("setup", "demo", "test", "check", "lint", "bench", "lock", "clean")


def locked_versions(name: str, environment: dict[str, str]) -> list[str]:
    """Return the pins of `name` that apply in `environment`; more or less than one is a broken lock."""
    pins = [pin for pin in LOCK if canonicalize_name(pin.name) == canonicalize_name(name)]
    applying = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    return [specifier.version for pin in applying for specifier in pin.specifier]


def environment_of(python: str, platform: str, machine: str) -> dict[str, str]:
    changed = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[platform],
        "platform_machine": machine,
    }
    return {**{key: str(value) for key, value in default_environment().items()}, **changed}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(("platform", "machine"), [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")])
def test_lock_pins_every_direct_dependency_within_its_range(python: str, platform: str, machine: str) -> None:
    environment = environment_of(python, platform, machine)
    for requirement in RUNTIME + DEV:
        if requirement.name == "torch":
            continue
        versions = locked_versions(requirement.name, environment)
        assert len(versions) == 1, f"{requirement.name}: {versions}; run `make lock`"
        assert versions[0] in requirement.specifier, f"{requirement}: {versions[0]} is locked; run `make lock`"


def test_lock_is_exact_and_leaves_torch_and_its_builds_to_the_owner() -> None:
    assert all(re.fullmatch(r"==[^,*]+", str(pin.specifier)) for pin in LOCK)
    assert not [pin.name for pin in LOCK if re.match(r"torch$|triton|nvidia|cuda|setuptools$", pin.name)]


def test_lock_names_no_place_to_download_from() -> None:
    assert not [line for line in LOCK_LINES if "://" in line or line.startswith("-") or " @ " in line]


def test_tested_torch_is_one_that_pyproject_allows() -> None:
    (allowed,) = (requirement for requirement in RUNTIME if requirement.name == "torch")
    (version,) = (specifier.version for specifier in TORCH.specifier)
    assert TORCH.name == "torch"
    assert version in allowed.specifier
    assert f">={'.'.join(map(str, minimum_torch_of_makefile()))}" in str(allowed.specifier).split(",")


def minimum_torch_of_makefile() -> list[int]:
    match = re.search(r'version\("torch"\).*< \[(\d+), (\d+)\]', (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert match
    return [int(match[1]), int(match[2])]


def test_what_is_installed_here_is_what_is_locked() -> None:
    """The suite vouches for the lock only if it ran with it."""
    environment = {key: str(value) for key, value in default_environment().items()}
    direct = [requirement.name for requirement in RUNTIME + DEV if requirement.name != "torch"]
    differing = {
        name: metadata.version(name)
        for name in direct
        if [metadata.version(name)] != locked_versions(name, environment)
    }
    assert not differing, "run `make setup`"


def test_python_range_is_the_one_that_the_commands_look_for() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(8, 18) if f"3.{minor}" in supported] == ["3.11", "3.12", "3.13"]
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("folders", "declared"),
    [(PACKAGES, RUNTIME), (("tests",), RUNTIME + DEV)],
    ids=["runtime", "tests"],
)
def test_every_import_is_declared(folders: tuple[str, ...], declared: list[Requirement]) -> None:
    """Oracle: which installed distribution provides an imported name, from the installed metadata."""
    known = {canonicalize_name(requirement.name) for requirement in declared}
    providers = metadata.packages_distributions()
    undeclared = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for name in imported_names(path) - sys.stdlib_module_names - {*PACKAGES, "tests"}:
            if not {canonicalize_name(provider) for provider in providers.get(name, [])} & known:
                undeclared.add(f"{name} in {path.relative_to(ROOT)}")
    assert not undeclared


def test_every_runtime_dependency_is_imported() -> None:
    """Oracle: as above. What came to be needed without an import would be listed here, with the reason."""
    providers = metadata.packages_distributions()
    imported = {
        canonicalize_name(provider)
        for folder in PACKAGES
        for path in (ROOT / folder).rglob("*.py")
        for name in imported_names(path)
        for provider in providers.get(name, [])
    }
    declared = {canonicalize_name(requirement.name) for requirement in RUNTIME}
    assert not declared - imported


def imported_names(path: Path) -> set[str]:
    """Return the top-level names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.slow
def test_wheel_holds_the_three_packages_the_scripts_and_the_licence(tmp_path: Path) -> None:
    """Oracle: the wheel itself, built as an installer builds it."""
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=60)
    (wheel,) = tmp_path.glob("handcar-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    assert {name for name in names if name.endswith(".py")} == {
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    }
    assert any(name.endswith("/LICENSE") for name in names)
    for script in (
        "peer = peer.cli:main",
        "coordinator = coordinator.cli:main",
        "swarm = coordinator.monitor.cli:main",
    ):
        assert script in entry_points


def test_scripts_lead_to_functions() -> None:
    for target in PROJECT["scripts"].values():
        module, function = target.split(":")
        text = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        defined = {getattr(node, "name", "") for node in ast.parse(text).body}
        assert function in defined, target


def test_top_level_holds_nothing_else() -> None:
    """Oracle: the list of design section 4; dot-files are free."""
    assert {name for name in files_of_this_tree() if not name.startswith(".")} <= TOP_LEVEL


def files_of_this_tree() -> set[str]:
    """Return the top-level names that git would commit, or all of them where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.CalledProcessError):
        return {path.name for path in ROOT.iterdir()}
    return {line.split("/")[0] for line in listed.splitlines()}


def clean_env(**changed: str) -> dict[str, str]:
    """Return the environment of a new user: nothing of the make that may be running this."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MAKE")} | changed


def test_make_without_a_target_lists_all_of_them() -> None:
    done = subprocess.run(["make"], cwd=ROOT, env=clean_env(), capture_output=True, text=True, check=True, timeout=30)
    assert [target for target in TARGETS if f"make {target} " not in done.stdout] == []


def test_make_names_the_python_that_it_needs(tmp_path: Path) -> None:
    """Oracle: `false` as the interpreter, as unfit as one can be. One line on stderr, and nothing is left behind."""
    command = ["make", "--silent", "--no-print-directory", "setup", f"VENV={tmp_path / 'env'}", "PYTHON=false"]
    done = subprocess.run(command, cwd=ROOT, env=clean_env(), capture_output=True, text=True, timeout=30)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert done.returncode != 0
    assert len(lines) == 1
    assert "Python 3.11, 3.12 or 3.13 is needed" in lines[0]
    assert not (tmp_path / "env").exists()


@pytest.mark.parametrize(
    ("failing", "called"),
    [("nothing", ["lint", "test-all"]), ("lint", ["lint"]), ("test-all", ["lint", "test-all"])],
)
def test_ci_lints_and_runs_the_tests_and_fails_with_them(tmp_path: Path, failing: str, called: list[str]) -> None:
    """Oracle: a `make` that notes what it was asked for and fails on command."""
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$*" >> "$CALLS"\n[ "$*" != "$FAILING" ]\n')
    make.chmod(0o755)
    calls = tmp_path / "calls"
    env = clean_env(PATH=f"{tmp_path}:{os.environ['PATH']}", CALLS=str(calls), FAILING=failing)
    done = subprocess.run(["bash", str(ROOT / ".ci/run")], env=env, cwd=tmp_path, capture_output=True, timeout=30)
    assert calls.read_text().split() == called
    assert (done.returncode == 0) is (failing == "nothing")


def test_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^make demo\b", text, re.MULTILINE)
    assert re.search(r"^make test\b", text, re.MULTILINE)
