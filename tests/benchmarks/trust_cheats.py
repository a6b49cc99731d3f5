"""Ways to cheat, each a small class: only tests have them, no wheel does.

Owns: what a cheat does instead of what it should. Must not know: who notices.
"""

from __future__ import annotations

import random
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peer.engine.replay import Climb, Replay
from peer.model.blocks import named_views
from protocol.architecture import stage_blocks
from protocol.audits import AuditOrder, AuditReport, ShareReport, SketchOrder, SumOrder
from protocol.layout import BlockKind
from protocol.receipts import Hop
from protocol.sketch import scaled, summed
from tests.benchmarks.trust_model import CONFIG, LENGTH, STAGES, Source

if TYPE_CHECKING:
    from tests.benchmarks.trust_world import Member, Task, World


class Cheat:
    """Honest in everything: subclasses override what they do not do."""

    stages: tuple[int, ...] = (0, 1, 2)
    """Where it makes sense."""
    note = ""

    def __init__(self, rate: float = 1.0) -> None:
        self.rate = rate

    def enter(self, world: World, member: Member) -> None:
        """Take a seat."""
        self.world, self.member = world, member
        self.chance = random.Random(f"cheat/{member.peer}")
        self._now: tuple[Task, bool] | None = None

    def begin(self, task: Task) -> None:
        """A task comes in; decide whether to do it right."""
        self._now = task, self.chance.random() < self.rate

    def does(self, task: Task) -> bool:
        """Tell whether this task is done wrong."""
        return self._now is not None and self._now[0] == task and self._now[1]

    def labels(self, task: Task, labels: Tensor) -> Tensor:
        return labels

    def sends_on(self, task: Task, source: Source, honest: bytes) -> bytes:
        if not self.does(task):
            return honest
        values = self.world.decode(honest, is_gradient=False)
        return self.world.encode(self.on(task, source, values), is_gradient=False)

    def sends_back(self, task: Task, source: Source, gradient: bytes | None, honest: bytes) -> bytes:
        if not self.does(task):
            return honest
        values = self.world.decode(honest, is_gradient=True)
        return self.world.encode(self.back(task, source, values), is_gradient=True)

    def on(self, task: Task, source: Source, values: Tensor) -> Tensor:
        """Change activations."""
        return values

    def back(self, task: Task, source: Source, values: Tensor) -> Tensor:
        """Change a gradient."""
        return values

    def contributes(self, number: int, values: Tensor) -> Tensor:
        return values

    def claims(self, tokens: int) -> int:
        return tokens

    def shows(self, given: Sequence[Tensor], honest: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return of what it sketches its contribution."""
        return given

    def makes(self, total: Tensor) -> Tensor:
        """Return what it makes of a part that it adds up for all."""
        return total

    def shares(self, honest: ShareReport) -> ShareReport:
        """Return what it says of an average share by share."""
        return honest

    def says(self, sent: list[Hop], served: list[Hop]) -> tuple[list[Hop], list[Hop]]:
        return sent, served

    def sketches(self, order: SketchOrder, honest: bytes) -> bytes:
        return honest

    def reports(self, order: AuditOrder | SumOrder, honest: AuditReport) -> AuditReport:
        return honest


class SignFlip(Cheat):
    """Turns the sign of what it sends on and back."""

    def __init__(self, rate: float = 1.0, *, factor: float = 1.0) -> None:
        super().__init__(rate)
        self.factor = factor

    def on(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return values * -self.factor

    def back(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return values * -self.factor


class Noise(Cheat):
    """Adds noise of so large a part of what it sends."""

    def __init__(self, rate: float = 1.0, *, part: float) -> None:
        super().__init__(rate)
        self.part = part

    def on(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return values + self.part * values.square().mean().sqrt() * self._normal(values)

    def back(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return values + self.part * values.square().mean().sqrt() * self._normal(values)

    def _normal(self, values: Tensor) -> Tensor:
        return torch.randn(values.shape, generator=torch.Generator().manual_seed(self.chance.randrange(1 << 40)))


class Idle(Cheat):
    """Does nothing: its contributions are zeros, as it has nothing else."""

    def contributes(self, number: int, values: Tensor) -> Tensor:
        return torch.zeros_like(values)


class Zeros(Idle):
    """Sends zeros."""

    def on(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return torch.zeros_like(values)

    def back(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return torch.zeros_like(values)


class Echo(Idle):
    """Sends what came in: on, and back (the last stage has activations to send back only)."""

    stages = (1, 2)
    note = "stages 1 and 2: the first one gets tokens"

    def on(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return self.world.decode(source, is_gradient=False)  # type: ignore[arg-type]

    def sends_back(self, task: Task, source: Source, gradient: bytes | None, honest: bytes) -> bytes:
        return gradient if gradient is not None else source  # type: ignore[return-value]


class Repeat(Idle):
    """Sends what it once computed for another task."""

    def __init__(self, rate: float = 1.0) -> None:
        super().__init__(rate)
        self._old: dict[str, Tensor] = {}

    def on(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return self._old.setdefault("on", values)

    def back(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return self._old.setdefault("back", values)

    def does(self, task: Task) -> bool:
        """The first is honest, as there is nothing older."""
        return super().does(task) and self.member.tasks > 0


class OtherWeights(Cheat, ABC):
    """Computes honestly, with other weights than it should."""

    def enter(self, world: World, member: Member) -> None:
        super().enter(world, member)
        self._replay = Replay(CONFIG, num_stages=STAGES, stage=member.stage)
        self._climbs: dict[Task, Climb] = {}
        self._sums: dict[int, Tensor] = {}

    @abstractmethod
    def weights(self) -> Sequence[Tensor]:
        """Return those with which it computes."""

    def sends_on(self, task: Task, source: Source, honest: bytes) -> bytes:
        outputs = self._up(task, source).outputs[0]
        return self.world.encode(outputs, is_gradient=False)

    def sends_back(self, task: Task, source: Source, gradient: bytes | None, honest: bytes) -> bytes:
        if gradient is None:
            climb = self._up(task, source)
            ((_, by_outputs),) = self._replay.losses(climb, [self.world.texts(task)[1]], self._add)
        else:
            climb, by_outputs = self._climbs.pop(task), self.world.decode(gradient, is_gradient=True)
        (back,) = self._replay.down(climb, [by_outputs], self._add)
        return self.world.encode(back, is_gradient=True)

    def contributes(self, number: int, values: Tensor) -> Tensor:
        return self._sums.pop(number, values)

    def _up(self, task: Task, source: Source) -> Climb:
        inputs = self.world.decode(source, is_gradient=False) if isinstance(source, bytes) else torch.from_numpy(source)
        self._climbs = {task: self._replay.up(self.weights(), [inputs])}
        return self._climbs[task]

    def _add(self, block: int, gradient: Tensor) -> None:
        self._sums[block] = self._sums[block] + gradient if block in self._sums else gradient


class SkippedLayer(OtherWeights):
    """Leaves its last layer out."""

    def weights(self) -> Sequence[Tensor]:
        flat = self.member.engine.shared_weights()
        layouts = stage_blocks(CONFIG, STAGES, self.member.stage)
        (*_, layer) = (block for block, layout in enumerate(layouts) if layout.kind is BlockKind.LAYER)
        for name, view in named_views(layouts[layer], flat[layer]).items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                view.zero_()  # what is added to the residual stream is nothing
        return flat


class StaleWeights(OtherWeights):
    """Goes on with the weights of its first round."""

    def __init__(self, rate: float = 1.0) -> None:
        super().__init__(rate)
        self._first: Sequence[Tensor] | None = None

    def weights(self) -> Sequence[Tensor]:
        if self._first is None:
            self._first = self.member.engine.shared_weights()
        return self._first

    def does(self, task: Task) -> bool:
        """In the first round it is honest."""
        return super().does(task) and task.round > 0


class HalfSequence(Cheat):
    """Computes half of the positions, and sends them twice."""

    def on(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return torch.cat([values[:, : LENGTH // 2]] * 2, dim=1)

    def back(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return torch.cat([values[:, : LENGTH // 2]] * 2, dim=1)


class LabelFlip(Cheat):
    """Takes the loss by other labels."""

    stages = (2,)
    note = "last stage only: others have no labels"

    def labels(self, task: Task, labels: Tensor) -> Tensor:
        return CONFIG["vocab_size"] - 1 - labels if self.does(task) else labels


class InflatedTokens(Cheat):
    """Claims ten times its tokens for its contribution, and signs for numbers that it never saw."""

    note = "nobody takes a claim for work: it is not put out for that"

    def claims(self, tokens: int) -> int:
        return 10 * tokens

    def says(self, sent: list[Hop], served: list[Hop]) -> tuple[list[Hop], list[Hop]]:
        known = {hop.number for hop in served}
        return sent, [
            *served,
            *(
                replace(hop, number=number)
                for hop in served[:1]
                for number in range(self.world.setting.microbatches)
                if number not in known
            ),
        ]

    def does(self, task: Task) -> bool:
        """Its work is right; what it claims beyond is nobody's task."""
        return False


class NotANumber(Cheat):
    """Sends NaN."""

    note = (
        "refused by who gets it, and the task goes to somebody else; put out once most of a neighbouring stage say so"
    )

    def sends_on(self, task: Task, source: Source, honest: bytes) -> bytes:
        return b"\xff" * len(honest)

    def sends_back(self, task: Task, source: Source, gradient: bytes | None, honest: bytes) -> bytes:
        return b"\xff" * len(honest)


class PoisonedActivations(Cheat):
    """Turns and scales what it sends on; what it sends back is honest."""

    stages = (0, 1)
    note = "stages 0 and 1: the last one sends none"

    def on(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return values * -1.5


class PoisonedGradients(Cheat):
    """Turns and scales what it sends back; what it sends on is honest."""

    stages = (1, 2)
    note = "stages 1 and 2: the first one sends none"

    def back(self, task: Task, source: Source, values: Tensor) -> Tensor:
        return values * -1.5


class PoisonedContribution(Cheat):
    """Passes on what is right, and turns the sign of its sum."""

    def contributes(self, number: int, values: Tensor) -> Tensor:
        return -values


class HiddenContribution(PoisonedContribution):
    """Does the same, and sketches what it should have given."""

    def shows(self, given: Sequence[Tensor], honest: Sequence[Tensor]) -> Sequence[Tensor]:
        return honest


class PartlyHiddenContribution(PoisonedContribution):
    """Turns the sign of its sum, and tells other bytes of one of its microbatches: so nobody can recompute it all."""

    note = "six tasks a round instead of two, of which it hides one"

    def says(self, sent: list[Hop], served: list[Hop]) -> tuple[list[Hop], list[Hop]]:
        hidden = max((hop.number for hop in (*sent, *served)), default=-1)
        told = [
            [replace(hop, given=hop.returned) if hop.number == hidden else hop for hop in hops]
            for hops in (sent, served)
        ]
        return told[0], told[1]


class LyingReducer(Cheat):
    """Turns the sign of what it adds up for all."""

    note = "its tasks are right; the loss is of the sums that it makes"

    def makes(self, total: Tensor) -> Tensor:
        self.member.lies += 1
        return -total

    def does(self, task: Task) -> bool:
        """Its work is right."""
        return False


class FramingReducer(LyingReducer):
    """Does the same, and says that somebody else has sent it so: always another one."""

    def shares(self, honest: ShareReport) -> ShareReport:
        """Lay what is missing on a member, so that its own words fit each other. It is first in order."""
        victim = self.chance.randrange(1, len(honest.taken))
        share = 1 / len(honest.taken) if self.world.setting.mode == "diloco" else 1.0
        others = summed(each for index, each in enumerate(honest.taken) if index != victim)
        laid = summed((scaled(honest.totals[0], 1 / share), scaled(others, -1.0)))
        taken = [laid if index == victim else each for index, each in enumerate(honest.taken)]
        return honest.model_copy(update={"taken": tuple(taken)})


class LyingNeighbour(Cheat):
    """Sketches other bytes than it got, so that its neighbours look bad."""

    note = "its own work is right; the loss is of work that others had to take over"

    def sketches(self, order: SketchOrder, honest: bytes) -> bytes:
        self.member.lies += 1
        return noise_sketch(honest, self.chance)

    def does(self, task: Task) -> bool:
        """Its work is right."""
        return False


class LyingAuditor(LyingNeighbour):
    """Finds everybody wrong."""

    def sketches(self, order: SketchOrder, honest: bytes) -> bytes:
        return honest

    def reports(self, order: AuditOrder | SumOrder, honest: AuditReport) -> AuditReport:
        self.member.lies += 1
        return honest.model_copy(
            update={
                "outputs": noise_sketch(honest.outputs, self.chance),
                "returned": noise_sketch(honest.returned, self.chance),
            }
        )


class Accomplice(Cheat):
    """Audits honestly but for its partners, of which it finds whatever they have sent."""

    note = "two of four at stage 1, nobody elsewhere: one cheats, the other covers for it"

    def reports(self, order: AuditOrder | SumOrder, honest: AuditReport) -> AuditReport:
        partners = {each.peer for each in self.world.members if each.cheat is not None}
        if isinstance(order, SumOrder):
            return honest
        carried = self.world.carried.get((order.round, order.number, order.first_stage))
        if carried is None or carried.peer not in partners:
            return honest
        self.member.lies += 1
        sketch = partial(self.member.recomputer.sketch_bytes, seed=order.seed)
        told = [
            sketch(data, is_gradient=is_gradient) if data else b""
            for data, is_gradient in ((carried.on, False), (carried.back, True))
        ]
        return honest.model_copy(update={"outputs": told[0], "returned": told[1]})

    def does(self, task: Task) -> bool:
        """Its work is right."""
        return False


class Sleeper(SignFlip):
    """Honest for so many tasks, and then turns signs."""

    def __init__(self, rate: float = 1.0, *, honest_tasks: int = 2000) -> None:
        super().__init__(rate)
        self.honest_tasks = honest_tasks

    def begin(self, task: Task) -> None:
        self._now = task, self.member.tasks >= self.honest_tasks


def noise_sketch(honest: bytes, chance: random.Random) -> bytes:
    """Return a sketch of nothing in particular, as large as an honest one."""
    numbers = [chance.gauss(0, 1) for _ in range(len(honest) // 4)]
    return struct.pack(f"<{len(numbers)}f", *numbers)
