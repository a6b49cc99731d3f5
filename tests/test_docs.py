"""What is written for people is true of the code: paths, commands, options, error codes, links.

Oracles: the files of this tree, click's own description of the commands, the error tree, the manifest's fields,
and for what a command imports a fresh interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
from click.testing import CliRunner

from coordinator.cli import coordinator
from coordinator.init import SECTIONS
from coordinator.monitor.cli import swarm
from coordinator.presets import PRESETS, Preset
from coordinator.settings import CoordinatorSettings
from peer.cli import peer
from protocol.errors import SwarmError

ROOT = Path(__file__).parents[1]
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docker").rglob("*.md")])
GROUPS: dict[str, click.Group] = {"peer": peer, "coordinator": coordinator, "swarm": swarm}
MAX_HELP_LINES = 40

TOP_LEVEL = ("peer", "coordinator", "protocol", "tests", "docs", "docker", ".lock", ".ci")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
IMAGE = re.compile(r"^docker run .*?handcar-(peer|coordinator)(?::\w+)? ")
DOCKERS_OPTIONS = {"--network", "--stop-timeout"}


def commands_of(group: click.Group, *before: str) -> Iterator[tuple[str, click.Command]]:
    """Yield all commands of a group, those of groups in it with both words."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands_of(command, *before, name)
        else:
            yield " ".join((*before, name)), command


def inline_code(text: str) -> Iterator[str]:
    """Yield the code spans of a page, without its fenced blocks."""
    yield from INLINE.findall(FENCE.sub("", text))


def shell_lines(text: str) -> Iterator[str]:
    """Yield what a reader would type: the lines of `sh` blocks."""
    for language, block in FENCE.findall(text):
        if language == "sh":
            yield from block.splitlines()


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")}


COMMANDS = {(name, sub): command for name, group in GROUPS.items() for sub, command in commands_of(group)}
ALL_OPTIONS = set().union(*(options_of(command) for command in COMMANDS.values()))


# -- paths and links --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", DOCS, ids=named)
def test_paths_exist(page: Path) -> None:
    missing = [word for word in inline_code(page.read_text("utf-8")) if is_repo_path(word) and not exists(word)]
    assert not missing


def is_repo_path(word: str) -> bool:
    """Tell a path of this repository (or the bare name of a module) from commands, names and blobs."""
    if not re.fullmatch(r"[\w./-]+", word):
        return False
    return ("/" in word and word.split("/")[0] in TOP_LEVEL) or word.endswith((".py", ".toml"))


def exists(word: str) -> bool:
    if "/" in word or (ROOT / word).exists():
        return (ROOT / word).exists()
    return word in module_names()


def module_names() -> set[str]:
    return {path.name for folder in TOP_LEVEL[:4] for path in (ROOT / folder).rglob("*.py")}


def test_a_missing_path_is_noticed() -> None:
    assert not exists("peer/nothing.py")
    assert not exists("nothing.py")
    assert is_repo_path("peer/nothing.py")
    assert is_repo_path("nothing.py")
    assert not is_repo_path("peer join")
    assert not is_repo_path("tokens/FILE/N")


def test_module_map_names_modules_that_exist() -> None:
    blocks = [block for _, block in FENCE.findall((ROOT / "docs/architecture.md").read_text("utf-8"))]
    words = {word for block in blocks for word in re.findall(r"[\w/]+\.py\b", block)}
    assert len(words) > 50
    ours = {named(path) for folder in TOP_LEVEL[:4] for path in (ROOT / folder).rglob("*.py")}
    assert not [word for word in words if not any(f"/{path}".endswith(f"/{word}") for path in ours)]


@pytest.mark.parametrize("page", DOCS, ids=named)
def test_relative_links_resolve(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text("utf-8")) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target.split("#")[0]).exists()]


def test_every_page_is_linked_from_another() -> None:
    linked = {
        (page.parent / target.split("#")[0]).resolve()
        for page in DOCS
        for target in LINK.findall(page.read_text("utf-8"))
        if "://" not in target
    }
    assert not [named(page) for page in DOCS if page.name != "README.md" and page.resolve() not in linked]


def test_index_of_decisions_is_complete() -> None:
    """Each entry repeats its page's title, whatever stands between number and title there."""
    folder = ROOT / "docs/decisions"
    listed = dict(
        re.findall(r"^\| \[(\d{4})\]\(\1-[a-z0-9-]+\.md\) \| (.+) \|$", (folder / "README.md").read_text(), re.M)
    )
    titles = {}
    for page in folder.glob("[0-9]*.md"):
        match = re.match(r"# (\d{4}):? (.+)\n", page.read_text("utf-8"))
        assert match, f"{page.name} does not begin with its number and title"
        assert page.name.startswith(match[1])
        titles[match[1]] = match[2]
    assert listed == titles


# -- commands ---------------------------------------------------------------------------------------


def commands_in(text: str) -> Iterator[str]:
    """Yield the command lines of a page, those inside images as if they were typed directly."""
    for line in [*shell_lines(text), *inline_code(text)]:
        words = line.removeprefix(".venv/bin/")
        if image := IMAGE.match(words):
            words = f"{image[1]} {typed_in_image(image[1], words[image.end() :])}"
        if words.split(" ")[0] in GROUPS and " " in words:
            yield words


def typed_in_image(role: str, arguments: str) -> str:
    """Return what the entrypoint makes of these arguments, as far as the choice of the command goes."""
    if role == "peer" and arguments.startswith("handcar1:"):
        return f"join {arguments}"
    return f"run DIR {arguments}" if arguments.startswith("-") else arguments


def command_in(line: str) -> tuple[str, str]:
    """Return the words of a command line that say which command it is."""
    group, *words = line.split()
    longer = (group, " ".join(words[:2]))
    return longer if longer in COMMANDS else (group, words[0])


def mistakes_in(line: str) -> list[str]:
    """List what of a command line does not exist."""
    group, subcommand = command_in(line)
    command = COMMANDS.get((group, subcommand))
    if command is None:
        return [] if subcommand in ("--help", "--version") else [f"{group} {subcommand}"]
    return [f"{group} {subcommand} {option}" for option in OPTION.findall(line) if option not in options_of(command)]


@pytest.mark.parametrize("page", DOCS, ids=named)
def test_commands_exist_with_their_options(page: Path) -> None:
    text = page.read_text("utf-8")
    wrong = [mistake for line in commands_in(text) for mistake in mistakes_in(line)]
    bare = [word for word in inline_code(text) if word.startswith("--")]
    wrong += [option for word in bare for option in OPTION.findall(word) if option not in ALL_OPTIONS | DOCKERS_OPTIONS]
    assert not wrong


def test_a_wrong_command_is_noticed() -> None:
    assert mistakes_in("peer joyn handcar1:x") == ["peer joyn"]
    assert mistakes_in("peer join handcar1:x --nome oak") == ["peer join --nome"]
    assert mistakes_in("peer bench plan --preset 1b --nome oak") == ["peer bench plan --nome"]
    assert mistakes_in("peer bench plans") == ["peer bench"]
    assert list(commands_in("```sh\ndocker run --rm -v a:/b handcar-peer:cuda handcar1:x --nome\n```\n")) == [
        "peer join handcar1:x --nome"
    ]


def test_docs_show_commands_at_all() -> None:
    shown = {command_in(line) for page in DOCS for line in commands_in(page.read_text("utf-8"))}
    assert shown >= set(COMMANDS)


@pytest.mark.parametrize(
    ("group", "page"), [("peer", "volunteer"), ("coordinator", "organiser"), ("swarm", "organiser")]
)
def test_every_option_is_described(group: str, page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text("utf-8")
    ours = set().union(*(options_of(command) for (name, _), command in COMMANDS.items() if name == group))
    assert ours <= set(OPTION.findall(text)) | {"--help"}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = {
        target
        for page in DOCS
        for line in [*shell_lines(page.read_text("utf-8")), *inline_code(page.read_text("utf-8"))]
        for target in re.findall(r"^make ([a-z][a-z-]*)\b", line)
    }
    assert {"demo", "test", "check", "bench"} <= targets
    for target in targets:
        name = target.removeprefix("bench-")
        module = name != target and (ROOT / f"tests/benchmarks/{name}.py").exists()
        assert module or re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_readme_shows_the_two_commands_as_they_are_typed() -> None:
    """They stand alone in one block: whoever copies it gets the demo and the tests, and nothing else."""
    assert ["make demo", "make test"] in [
        block.splitlines() for _, block in FENCE.findall((ROOT / "README.md").read_text("utf-8"))
    ]


# -- settings, presets, errors ----------------------------------------------------------------------


def test_settings_of_a_run_are_those_of_the_manifest() -> None:
    """Oracle: the fields of the classes that `--set` changes."""
    text = (ROOT / "docs/organiser.md").read_text("utf-8")
    rows = dict(re.findall(rf"^\| `({'|'.join(SECTIONS)})` \| (.+) \|$", text, re.MULTILINE))
    assert tuple(rows) == SECTIONS
    for section, row in rows.items():
        fields = set(type(getattr(PRESETS["demo"], section)).model_fields)
        assert fields <= set(INLINE.findall(row)), section
        assert set(INLINE.findall(re.sub(r"\(.*?\)", "", row))) <= fields, section


def test_choices_of_a_setting_are_those_that_the_manifest_takes() -> None:
    """Oracle: the annotations of the same classes. Whatever has choices shows all of them, and no others."""
    text = (ROOT / "docs/organiser.md").read_text("utf-8")
    rows = dict(re.findall(rf"^\| `({'|'.join(SECTIONS)})` \| (.+) \|$", text, re.MULTILINE))
    for section, row in rows.items():
        shown = {field: set(INLINE.findall(values)) for field, values in re.findall(r"`(\w+)` \((.+?)\)", row)}
        fields = type(getattr(PRESETS["demo"], section)).model_fields
        assert shown == {name: choices for name, field in fields.items() if (choices := choices_of(field.annotation))}


def choices_of(kind: Any) -> set[str]:
    """Return the words between which an annotation leaves the choice."""
    if get_origin(kind) is Literal:
        return set(get_args(kind))
    return {member.value for member in kind} if isinstance(kind, type) and issubclass(kind, StrEnum) else set()


def test_presets_are_those_that_exist() -> None:
    text = (ROOT / "docs/organiser.md").read_text("utf-8")
    table = text.split("| preset | model |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.MULTILINE))
    assert list(rows) == list(PRESETS)
    for name, row in rows.items():
        assert batch_words(PRESETS[name]) in row


def batch_words(preset: Preset) -> str:
    batch = preset.batch
    return f"{batch.sequences_per_microbatch} x {batch.sequence_length:,}"


def test_environment_variables_are_settings() -> None:
    named_there = {word for page in DOCS for word in re.findall(r"\bSWARM_([A-Z_]+)\b", page.read_text("utf-8"))}
    assert named_there
    assert {word.lower() for word in named_there} <= set(CoordinatorSettings.model_fields)


def error_classes(root: type[SwarmError] = SwarmError) -> Iterator[type[SwarmError]]:
    """Walk the tree in protocol/errors.py; subclasses elsewhere share the code of what they refine."""
    if root.__module__ == SwarmError.__module__:
        yield root
        for child in root.__subclasses__():
            yield from error_classes(child)


def test_every_error_code_has_an_entry_with_its_exit_code() -> None:
    sections = re.split(r"^## ", (ROOT / "docs/errors.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
    described = {section.split("\n")[0]: section.split("\n", 1)[1] for section in sections}
    codes = {error.code: error.exit_code for error in error_classes()}
    assert len(codes) == len(list(error_classes())), "two errors share a code"
    bug = {"E-BUG": 1}  # not an error of the tree: what `protocol/console.py` says of everything outside it
    assert {code: f"Exit {number}." for code, number in (codes | bug).items()} == {
        code: text[: text.index(".") + 1] for code, text in described.items()
    }


def test_tree_of_errors_draws_every_code() -> None:
    drawing = (ROOT / "protocol/errors.py").read_text("utf-8").split('"""')[1]
    drawn = {code: int(number) for code, number in re.findall(r"(E-[A-Z0-9-]+) +(\d)\b", drawing)}
    assert drawn == {error.code: error.exit_code for error in error_classes() if error is not SwarmError}


# -- help -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [*((name,) for name in GROUPS), *COMMANDS], ids=" ".join)
def test_help_fits_a_screen(words: tuple[str, ...]) -> None:
    name, *subcommand = " ".join(words).split()
    done = CliRunner().invoke(GROUPS[name], [*subcommand, "--help"], prog_name=name, terminal_width=80)
    assert done.exit_code == 0, done.output
    assert 3 < len(done.output.splitlines()) <= MAX_HELP_LINES


@pytest.mark.parametrize(("group", "subcommand"), COMMANDS)
def test_examples_in_help_can_be_typed(group: str, subcommand: str) -> None:
    """Oracle: click's own parser takes the example, so that its words and options exist."""
    command = COMMANDS[group, subcommand]
    match = re.search(r"^ *Example: (.+)$", command.help or "", re.MULTILINE)
    assert match, "no example"
    assert match[1].startswith(f"{group} {subcommand}")
    assert not mistakes_in(match[1])


@pytest.mark.slow
@pytest.mark.parametrize("module", ["peer.cli", "coordinator.cli", "coordinator.monitor.cli"])
def test_commands_answer_before_anything_heavy_is_imported(module: str) -> None:
    """Oracle: `sys.modules` of a fresh interpreter after the import that every `--help` pays for."""
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "click" in loaded
    assert not loaded & {"torch", "hivemind", "transformers", "bitsandbytes"}


# -- the images' script -----------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Callable[[str, Sequence[str]], str]:
    """Run the entrypoint with stand-ins for the two commands, which print what they were called with."""
    for name in ("peer", "coordinator"):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        script.chmod(0o755)

    def run(role: str, arguments: Sequence[str]) -> str:
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HANDCAR_ROLE": role}
        command = ["sh", str(ROOT / "docker/entrypoint.sh"), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=10)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


LISTEN = "--listen /ip4/0.0.0.0/tcp/31337"
HOST = "--host-maddr /ip4/0.0.0.0/tcp/4001"


@pytest.mark.parametrize(
    ("role", "arguments", "runs"),
    [
        ("peer", "handcar1:x --name oak", f"peer join --data-dir /data --device cpu {LISTEN} handcar1:x --name oak"),
        ("peer", "handcar1:x --listen a", "peer join --data-dir /data --device cpu handcar1:x --listen a"),
        ("peer", "sample model", "peer sample model"),
        ("coordinator", "", f"coordinator run /data/run {HOST}"),
        ("coordinator", "--announce a", f"coordinator run /data/run {HOST} --announce a"),
        ("coordinator", "--host-maddr=b", "coordinator run /data/run --host-maddr=b"),
        ("coordinator", "init /data/run", "coordinator init /data/run"),
        ("coordinator", "--help", "coordinator --help"),
    ],
)
def test_entrypoint_runs_the_command_that_was_meant(
    images: Callable[[str, Sequence[str]], str], role: str, arguments: str, runs: str
) -> None:
    assert images(role, arguments.split()) == runs


def test_entrypoint_takes_every_option_of_serving(images: Callable[[str, Sequence[str]], str]) -> None:
    """An option in the place of a command means `coordinator run`, so the script has to know them all."""
    serving = sorted(options_of(COMMANDS["coordinator", "run"]))
    assert len(serving) > 5
    for option in serving:
        assert images("coordinator", [option]).startswith("coordinator run /data/run "), option
