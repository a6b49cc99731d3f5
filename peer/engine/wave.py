"""What each microbatch of a wave gets: its own result or its own error.

Owns: whom an error belongs to. Must not know: what a wave does. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from protocol.errors import LocalFault, SwarmError

Started = TypeVar("Started")
Result = TypeVar("Result")


def run_wave(
    count: int,
    start: Callable[[int], Started],
    run: Callable[[list[int], list[Started]], Sequence[Result]],
    *,
    one_by_one: bool = False,
) -> list[Result | SwarmError]:
    """Run what can be started as one wave; return everybody's result or error.

    A wave that fails on this machine fails for all; with `one_by_one` each is tried alone then: one of them may have
    brought numbers that overflow here.
    """
    results: list[Result | SwarmError | None] = [None] * count
    started: dict[int, Started] = {}
    for number in range(count):
        try:
            started[number] = start(number)
        except SwarmError as error:
            results[number] = error
    fault: LocalFault | None = None
    waves = [list(started)]
    while waves:
        numbers = waves.pop(0)
        try:
            found = run(numbers, [started[number] for number in numbers]) if numbers else []
        except LocalFault as error:
            if one_by_one and len(numbers) > 1:
                waves += [[number] for number in numbers]
                continue
            fault = fault or error  # all of a wave have the same one, as it counts once
            results = [fault if index in numbers else each for index, each in enumerate(results)]
        else:
            for number, result in zip(numbers, found, strict=True):
                results[number] = result
    return results  # type: ignore[return-value] # every number was started, or has its error


def settled(results: Sequence[Result | SwarmError]) -> Result:
    """Return the one result there is, or raise what it is."""
    (result,) = results
    if isinstance(result, SwarmError):
        raise result
    return result
