"""Who takes part and what they have earned, as tables, from a status document. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.monitor.render import plain

UNITS = ("MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP")
NAME_WIDTH = 20
ID_CHARS = 8


@dataclass(frozen=True, slots=True)
class Table:
    """What `--json` prints, and what people read."""

    data: dict[str, Any]
    lines: tuple[str, ...]


def peers(document: Mapping[str, Any]) -> Table:
    """List everybody, those who are here first."""
    rows = document["peers"]
    place = f"{'peer':<{NAME_WIDTH}} {'id':<{ID_CHARS}}  {'state':<12} {'standing':<14} {'stages':<10}"
    lines = [f"{place} {'earned':>12} disputed"]
    for row in rows:
        stages = ",".join(str(stage) for stage in row["stages"])
        earned = flop(_earned(row))
        name, short, state = plain(row["name"]), row["peer"][-ID_CHARS:], row["state"]
        place = f"{name:<{NAME_WIDTH}} {short}  {state:<12} {row['standing']:<14} {stages:<10}"
        lines.append(f"{place} {earned:>12} {row['disputed_hops']}")
    if document["peers_omitted"]:
        lines.append(f"and {document['peers_omitted']} more")
    return Table({"peers": rows, "peers_omitted": document["peers_omitted"]}, tuple(lines))


def credits(document: Mapping[str, Any]) -> Table:
    """List who has earned something, most first."""
    ordered = sorted(document["peers"], key=lambda row: (-_earned(row), row["peer"]))
    ranked = [
        {"rank": rank, "name": row["name"], "peer": row["peer"], **row["credits"]}
        for rank, row in enumerate((row for row in ordered if _earned(row)), start=1)
    ]
    lines = [f"{'':>4} {'peer':<{NAME_WIDTH}} {'id':<{ID_CHARS}}  {'free':>12} {'held':>12} {'tokens':>15}"]
    for row in ranked:
        tokens = row["free_tokens"] + row["held_tokens"]
        name, short = plain(row["name"]), row["peer"][-ID_CHARS:]
        free, held = flop(row["free_mflop"]), flop(row["held_mflop"])
        lines.append(f"{row['rank']:>4} {name:<{NAME_WIDTH}} {short}  {free:>12} {held:>12} {tokens:>15,}")
    total = sum(_earned(row) for row in document["peers"])
    lines.append(f"{len(ranked)} peers have earned {flop(total)}")
    data = {"unit": "MFLOP", "credits": ranked, "total_mflop": total, "peers_omitted": document["peers_omitted"]}
    return Table(data, tuple(lines))


TABLES: Mapping[str, Callable[[Mapping[str, Any]], Table]] = {"peers": peers, "credits": credits}


def flop(mflop: float) -> str:
    """Write millions of operations with the unit that fits."""
    return _scaled(mflop, UNITS)


def _scaled(value: float, units: Iterable[str]) -> str:
    *smaller, largest = units
    for unit in smaller:
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {largest}"


def _earned(row: Mapping[str, Any]) -> int:
    return int(row["credits"]["free_mflop"] + row["credits"]["held_mflop"])
