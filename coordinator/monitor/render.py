"""A status document as plain lines for people. Pure.

Must not know: where the document came from. What is unknown is shown as a question mark; strangers' words
are stripped of control characters, because they go to a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

UNKNOWN = "?"
MAX_SHOWN_PEERS = 40
KIB = 1024


def render(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of `swarm status`."""
    yield _line("run", f"{plain(document['name'])} ({document['run'][:12]})  {document['state']}")
    yield _line("round", f"{_number(document['round'])} of {document['num_rounds']}  {_speed(document)}")
    yield _line("loss", _losses(document))
    yield _line("work", _work(document["ledger"]))
    for stage in document["stages"]:
        yield _line(f"stage {stage['stage']}", _stage(stage))
    yield from _peers(document)
    for topic, text in sorted(document["notes"].items()):
        yield _line("note", f"{plain(topic)}: {plain(text)}")


def num_bytes(count: float) -> str:
    """Write a number of bytes in IEC units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < KIB:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= KIB
    return f"{count:.1f} TiB"


def _line(label: str, text: str) -> str:
    return f"{label:<10} {text}"


def _speed(document: Mapping[str, Any]) -> str:
    speed = document["tokens_per_s"]
    return UNKNOWN + " tok/s" if speed is None else f"{speed:,.0f} tok/s"


def _losses(document: Mapping[str, Any]) -> str:
    heldout = document["heldout"]
    text = f"train {_nats(document['loss'])}"
    if heldout is None:
        return f"{text}  held-out {UNKNOWN}"
    bits = heldout["bits_per_byte"]
    return f"{text}  held-out {_nats(heldout['loss'])} ({bits:.3f} bits per byte) at round {heldout['round']}"


def _work(ledger: Mapping[str, Any]) -> str:
    tasks = f"{ledger['tasks_done']} tasks done, {ledger['tasks_resent']} sent again, {ledger['tasks_lost']} lost"
    text = f"{tasks}; {ledger['tokens']:,} tokens, {ledger['tokens_dropped']:,} dropped"
    rolled_back = ledger["rounds_rolled_back"]
    return f"{text}, {rolled_back} rounds rolled back" if rolled_back else text


def _stage(stage: Mapping[str, Any]) -> str:
    names = [plain(replica["name"]) + ("" if replica["member"] else "*") for replica in stage["replicas"]]
    text = f"version {_number(stage['version'])}  {len(names)} replicas: {', '.join(names[:8]) or 'nobody'}"
    if len(names) > 8:
        text += ", ..."
    last = stage["last_averaging"]
    if last is None:
        return text
    if not last["ok"]:
        return f"{text}  averaging of {last['took_part']} of {last['asked']} failed: {plain(last['reason'])}"
    size = f"{num_bytes(last['bytes_sent'])} up, {num_bytes(last['bytes_received'])} down in {last['seconds']:.1f} s"
    hidden = f" ({last['hidden_share']:.0%} hidden)" if last["hidden_share"] else ""
    return f"{text}  averaged {last['took_part']} of {last['asked']}, {size}{hidden}, group {last['group'][:8]}"


def _peers(document: Mapping[str, Any]) -> Iterator[str]:
    here = [peer for peer in document["peers"] if peer["presence"] == "live"]
    gone = len(document["peers"]) - len(here) + document["peers_omitted"]
    for peer in here[:MAX_SHOWN_PEERS]:
        reason = f"({plain(peer['reason'])})" if peer["reason"] else ""
        stages = ", ".join(str(stage) for stage in peer["stages"])
        seen = f"seen {peer['seen_s_ago']:.0f} s ago"
        yield _line("peer", f"{plain(peer['name']):<16} {peer['state'] + reason:<28} stages {stages}  {seen}")
    hidden = max(0, len(here) - MAX_SHOWN_PEERS)
    yield _line("peers", f"{len(here)} here{f' ({hidden} not shown)' if hidden else ''}, {gone} gone")


def _nats(loss: float | None) -> str:
    return UNKNOWN if loss is None else f"{loss:.4f}"


def _number(value: int | None) -> str:
    return UNKNOWN if value is None else str(value)


def plain(text: Iterable[str]) -> str:
    """Strip what a terminal would obey."""
    return "".join(char for char in text if char.isprintable())
