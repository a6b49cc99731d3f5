"""What attacks come to, and what honest peers have to bear: the rows `attack_*` and `clean_*` of `trust.py`.

One replica of four cheats in each stage (where it can at all), from the first round on unless it sleeps first. A row's
ratio is the held-out loss at the end over that of the same training in which all are honest. The rest is in its note:
how many tasks a cheat had done when it was put out, how many of them it did wrong, which part of these is paid for in
the end, and how many honest peers were struck.

Owns: which attacks there are, and what is counted. Must not know: how a swarm works (`trust_world.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import structlog

from tests.benchmarks import trust_cheats as cheats
from tests.benchmarks.harness import Options, Row, figure
from tests.benchmarks.trust_calibrate import bulk_audits
from tests.benchmarks.trust_cheats import Cheat
from tests.benchmarks.trust_model import MACHINES, MICROBATCHES, STAGES, HopCodec
from tests.benchmarks.trust_world import Member, Result, Setting, train

QUICK_ROUNDS, ROUNDS, CLEAN_ROUNDS = 24, 48, 120
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
CHEAT = 1  # the number of the replica that does
SLEEP_TASKS, QUICK_SLEEP_TASKS = 2000, 30
MANY_MICROBATCHES = 24  # of a round, where a cheat hides one of its own
SLEEP_MICROBATCHES, SLEEP_ROUNDS = 64, 149  # 16 tasks a round for each replica, and 24 rounds after the sleep
BULK_AUDITS, QUICK_BULK_AUDITS = 30_000, 1_000
LOSS_BAR, CREDIT_BAR = 1.02, 0.01

Attack = Callable[[], Cheat]

ATTACKS: dict[str, Attack] = {
    "sign_flip": cheats.SignFlip,
    "sign_flip_x10": partial(cheats.SignFlip, factor=10.0),
    "noise_3": partial(cheats.Noise, part=0.03),
    "noise_10": partial(cheats.Noise, part=0.10),
    "zeros": cheats.Zeros,
    "echo": cheats.Echo,
    "replay": cheats.Repeat,
    "skipped_layer": cheats.SkippedLayer,
    "half_sequence": cheats.HalfSequence,
    "label_flip": cheats.LabelFlip,
    "stale_weights": cheats.StaleWeights,
    "inflated_tokens": cheats.InflatedTokens,
    "nan": cheats.NotANumber,
    "poisoned_activations": cheats.PoisonedActivations,
    "poisoned_activations_10": partial(cheats.PoisonedActivations, 0.1),
    "poisoned_gradients": cheats.PoisonedGradients,
    "poisoned_gradients_10": partial(cheats.PoisonedGradients, 0.1),
    "poisoned_contribution": cheats.PoisonedContribution,
    "hidden_contribution": cheats.HiddenContribution,
    "partly_hidden_contribution": cheats.PartlyHiddenContribution,
    "lying_reducer": cheats.LyingReducer,
    "framing_reducer": cheats.FramingReducer,
    "lying_neighbour": cheats.LyingNeighbour,
    "lying_auditor": cheats.LyingAuditor,
    "colluding_pair": cheats.SignFlip,
    "sleeper": cheats.Sleeper,
}
DILOCO = "_diloco"
"""Behind the name of an attack: the same with local steps."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One attack with all of its seeds, and the same without it."""

    attacked: tuple[Result, ...]
    clean: tuple[Result, ...]

    @property
    def cheats(self) -> list[Member]:
        return [member for result in self.attacked for member in result.cheats]

    @property
    def fake_share(self) -> float:
        return max(result.fake_share() for result in self.attacked)

    @property
    def honest_struck(self) -> int:
        return sum(result.honest_struck() for result in self.attacked)


def rows(options: Options) -> Iterator[Row]:
    """Measure what was asked for of all attacks and of the clean swarm."""
    names = [f"{name}{ending}" for ending in ("", DILOCO) for name in ATTACKS]
    wanted = [name for name in names if options.wants(f"attack_{name}")]
    if options.quick and not options.only:
        wanted = [name for name in wanted if not name.endswith(DILOCO)]
    with quietly():
        if options.wants(*CLEAN_ROWS):
            yield from _clean(options)
        yield from _attacks(wanted, options)


def _attacks(names: Sequence[str], options: Options) -> Iterator[Row]:
    seeds = QUICK_SEEDS if options.quick else SEEDS
    clean: dict[tuple[int, int, str, int], Result] = {}
    worst: dict[str, Trial] = {}
    for name in names:
        attacked = []
        for seed in seeds:
            setting = setting_of(name, seed, quick=options.quick)
            key = seed, setting.rounds, setting.mode, setting.microbatches
            if key not in clean:
                clean[key] = train(replace(setting, cheats={}, is_defended=False))
            attacked.append((train(setting), clean[key]))
        trial = Trial(*(tuple(each) for each in zip(*attacked, strict=True)))
        worst[name] = trial
        yield _row(name, trial, quick=options.quick)
    if worst:
        struck = {name: trial.honest_struck for name, trial in worst.items()}
        note = "honest peers struck or put out; " + ", ".join(f"{n} {count}" for n, count in struck.items() if count)
        yield figure("attacks_honest_struck", sum(struck.values()), unit="peers", bar="<= 0", note=note)
        shares = {name: trial.fake_share for name, trial in worst.items()}
        note = "share of wrong tasks that are paid for; " + ", ".join(f"{n} {s:.1%}" for n, s in shares.items() if s)
        yield figure("attacks_fake_credit", max(shares.values()), unit="", bar=f"<= {CREDIT_BAR}", note=note)


def setting_of(name: str, seed: int, *, quick: bool) -> Setting:
    """Return the training of an attack."""
    attack = ATTACKS[name.removesuffix(DILOCO)]
    rounds = QUICK_ROUNDS if quick else ROUNDS
    made: dict[tuple[int, int], Attack] = {}
    if name.startswith("colluding_pair"):
        made = {(1, CHEAT): attack, (1, CHEAT + 1): cheats.Accomplice}
    elif name.startswith("sleeper"):
        sleep = QUICK_SLEEP_TASKS if quick else SLEEP_TASKS
        rounds = rounds if quick else SLEEP_ROUNDS
        made = {(stage, CHEAT): partial(cheats.Sleeper, honest_tasks=sleep) for stage in range(STAGES)}
    else:
        place = 0 if "reducer" in name else CHEAT  # small stages have few parts to be added up: the first members do it
        made = {(stage, place): attack for stage in range(STAGES) if stage in attack().stages}
    microbatches = MANY_MICROBATCHES if name.startswith("partly_hidden") else MICROBATCHES
    if name.startswith("sleeper") and not quick:
        microbatches = SLEEP_MICROBATCHES
    mode = "diloco" if name.endswith(DILOCO) else "gradient"
    machines = MACHINES[:2] if quick else MACHINES  # bf16 takes twice as long on a CPU
    return Setting(seed=seed, rounds=rounds, mode=mode, machines=machines, cheats=made, microbatches=microbatches)


def _row(name: str, trial: Trial, *, quick: bool) -> Row:
    ours = sum(result.loss for result in trial.attacked) / len(trial.attacked)
    reference = sum(result.loss for result in trial.clean) / len(trial.clean)
    said = summary(trial)
    if name.startswith("sleeper"):
        said += f"; honest for {QUICK_SLEEP_TASKS if quick else SLEEP_TASKS} tasks" + (
            " (full: 2,000)" if quick else ""
        )
    more = figures_of(trial)
    return replace(figure(f"attack_{name}", ours, reference, unit="nats", bar=f"<= {LOSS_BAR}", note=said), more=more)


def figures_of(trial: Trial) -> dict[str, float | None]:
    """Return what is counted of an attack besides the loss."""
    caught = sorted(
        (member.tasks_when_out or 0) - _honest_before(member)
        for member in trial.cheats
        if member.tasks_when_out is not None
    )
    wrong = sum(sum(member.bad.values()) for member in trial.cheats)
    return {
        "cheats": len(trial.cheats),
        "caught": len(caught),
        "tasks_until_caught_median": median(caught) if caught else None,
        "tasks_until_caught_p95": caught[math.ceil(0.95 * len(caught)) - 1] if caught else None,
        "wrong_tasks": wrong,
        "fake_credit_share": trial.fake_share,
        "honest_struck": trial.honest_struck,
        "refused": sum(member.refused for member in trial.cheats),
        "lies": sum(member.lies for member in trial.cheats),
    }


def summary(trial: Trial) -> str:
    """Say the same in a line."""
    told = figures_of(trial)
    text = f"{told['caught']} of {told['cheats']} caught"
    if told["caught"]:
        text += f", after {told['tasks_until_caught_median']:g} tasks (p95 {told['tasks_until_caught_p95']:g})"
    text += f"; {told['wrong_tasks']} wrong tasks let through, {told['fake_credit_share']:.1%} of them paid"
    text += f"; {told['honest_struck']} honest struck"
    if told["refused"]:
        text += f"; {told['refused']} tasks refused"
    if told["lies"]:
        text += f"; {told['lies']} lies"
    notes = {member.cheat.note for member in trial.cheats if member.cheat is not None and member.cheat.note}
    return "; ".join([text, *sorted(notes)])


def _honest_before(member: Member) -> int:
    cheat = member.cheat
    return cheat.honest_tasks if isinstance(cheat, cheats.Sleeper) else 0


# -- without attacks ------------------------------------------------------------------------------------

CLEAN_CODECS: tuple[HopCodec, ...] = ("fp16", "int8")
CLEAN_ROWS = ("clean_strikes", "clean_bans", "clean_false_audits", "clean_loss")


def _clean(options: Options) -> Iterator[Row]:
    """Train with honest peers on mixed machines, with and without defences."""
    defended, plain = [], []
    rounds = QUICK_ROUNDS if options.quick else CLEAN_ROUNDS
    for seed in QUICK_SEEDS if options.quick else SEEDS:
        for codec_name in CLEAN_CODECS:
            setting = Setting(seed=seed, rounds=rounds, machines=MACHINES, codec=codec_name)
            defended.append(train(setting))
            if codec_name == "fp16":
                plain.append((defended[-1], train(replace(setting, is_defended=False))))
    members = sum(len(result.members) for result in defended)
    audits = sum(sum(result.findings.values()) for result in defended)
    note = f"{members} honest peers, {audits:,} audits, machines: {', '.join(each.name for each in MACHINES)}"
    strikes = sum(sum(result.strikes.values()) for result in defended)
    yield figure("clean_strikes", strikes, unit="", bar="<= 0", note=note)
    yield figure("clean_bans", sum(len(result.out) for result in defended), unit="", bar="<= 0", note=note)
    false = sum(result.findings["differs", True] + result.findings["confirmed", True] for result in defended)
    pairs = QUICK_BULK_AUDITS if options.quick else BULK_AUDITS
    bulk = bulk_audits(pairs, seed=100)
    note = (
        f"{audits:,} in trainings, largest distance {_largest(defended)}; {bulk.audits:,} more of single microbatches"
    )
    yield figure("clean_false_audits", false + bulk.false, unit=f"of {audits + bulk.audits:,}", bar="<= 0", note=note)
    on, off = (sum(each) / len(plain) for each in zip(*((a.loss, b.loss) for a, b in plain), strict=True))
    yield figure("clean_loss", on, off, unit="nats", bar="<= 1.005", note="audits do not touch what is trained")


def _largest(results: Sequence[Result]) -> str:
    outputs, returned = (max(result.largest[index] for result in results) for index in range(2))
    return f"{outputs:.4f} of activations, {returned:.4f} of gradients"


@contextmanager
def quietly() -> Iterator[None]:
    """Log errors only while the block runs: thousands of audits have been found to differ."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        yield
    finally:
        structlog.reset_defaults()
