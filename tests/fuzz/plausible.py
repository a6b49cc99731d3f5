"""Plausible values of message classes, made from their fields' own annotations: what mutations begin with.

Owns: the way from pydantic's fields to values that mostly fit them. Must not know: any message in particular, so that a
new one needs nothing here.
"""

from __future__ import annotations

import enum
import re
import types
import typing
from random import Random
from typing import Annotated, Any, Union, get_args, get_origin

from protocol.errors import WireError
from protocol.wire import Message

TRIES = 10
SIGNER = "12D3KooWRdFFg3yTbTsDq5Z1yCvCWbqznEFro9jeVivo7rkayJ4D"
WORDS = ("", "a", "ab" * 16, "oak", SIGNER, "/ip4/192.0.2.1/tcp/4001", "fp16", "weights", "train.bin", "é", "x" * 33)


def plausible(kind: type[Message], chance: Random, *, tries: int = TRIES) -> dict[str, Any]:
    """Return the fields of a message of a kind, valid if that is found by luck."""
    fields: dict[str, Any] = {}
    for _ in range(tries):
        fields = {
            name: _value(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation, chance)
            for name, field in kind.model_fields.items()
        }
        try:
            kind.from_plain(fields)
        except WireError:
            continue
        break
    return fields


def _value(annotation: Any, chance: Random) -> Any:
    limits: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        limits += more
    annotation = getattr(annotation, "__supertype__", annotation)  # NewType
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _value(chance.choice(get_args(annotation)), chance)
    if origin is tuple:
        return _tuple(get_args(annotation), limits, chance)
    if origin is typing.Literal:
        return chance.choice(get_args(annotation))
    if isinstance(annotation, type):
        return _plain(annotation, limits, chance)
    return None


def _tuple(kinds: tuple[Any, ...], limits: list[Any], chance: Random) -> tuple[Any, ...]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        least, most = _lengths(limits, usual=2)
        return tuple(_value(kinds[0], chance) for _ in range(chance.randint(least, max(least, most))))
    return tuple(_value(kind, chance) for kind in kinds)


def _plain(kind: type, limits: list[Any], chance: Random) -> Any:
    if issubclass(kind, Message):
        return plausible(kind, chance, tries=2)  # each try of the message around it tries these again
    if issubclass(kind, enum.Enum):
        return chance.choice(list(kind)).value
    if kind is bool:
        return chance.random() < 0.5
    if kind is int:
        return _number(limits, chance)
    if kind is float:
        return float(_number(limits, chance)) / 2
    if kind is bytes:
        least, most = _lengths(limits, usual=32)
        return chance.randbytes(least if chance.random() < 0.3 else max(least, most))
    if kind is str:
        patterns = [pattern for limit in _flat(limits) if (pattern := getattr(limit, "pattern", None))]
        fitting = [word for word in WORDS if all(re.search(pattern, word) for pattern in patterns)]
        return chance.choice(fitting or WORDS)
    return None


def _number(limits: list[Any], chance: Random) -> int:
    bounds = {
        name: int(value)
        for limit in _flat(limits)
        for name in ("ge", "gt", "le", "lt")
        if (value := getattr(limit, name, None)) is not None
    }
    low = bounds.get("ge", bounds.get("gt", -1) + 1)
    high = bounds.get("le", bounds.get("lt", 101) - 1)
    return chance.choice((low, chance.randint(low, max(low, min(high, low + 100))), max(low, high)))


def _lengths(limits: list[Any], *, usual: int) -> tuple[int, int]:
    least, most = 0, usual
    for limit in _flat(limits):
        least = getattr(limit, "min_length", None) or least
        longest = getattr(limit, "max_length", None)
        most = most if longest is None else min(usual, longest)
    return least, most


def _flat(limits: list[Any]) -> list[Any]:
    """Return the single limits that pydantic's `Field` holds as well."""
    return [each for limit in limits for each in (limit, *getattr(limit, "metadata", ()))]
