"""What a demo tells: the progress line, the summary table, the JSON object, the model card's facts. Pure.

Owns: the fields of `coordinator.demo/1`. All figures about the training come from the run's database
(`status.py`, the ledger); the demo itself adds only what it alone knows: processes, seconds, kills.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = "coordinator.demo/1"
UNKNOWN = "?"


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a demo: the JSON data, and the text that the model wrote."""

    data: dict[str, Any]
    sample: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedPeer:
    """One peer process of this demo."""

    name: str
    pid: int
    killed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What only the demo knows."""

    seconds: float
    """Of training: without install, tokenizer and export, over all sittings of a resumed demo."""
    peers_killed: int
    started: tuple[StartedPeer, ...]
    replicas: tuple[int, ...]
    """Members of every stage when training was last seen going on."""
    export_dir: Path
    exported_round: int | None
    """Of the checkpoint that was exported."""
    seed: int
    sample: str | None


def summarise(status: Mapping[str, Any], facts: Facts) -> Summary:
    """Put the summary together from the last status and what the demo knows."""
    ledger, heldout = status["ledger"], _heldout_at(status, facts.exported_round)
    by_name = {peer["name"]: peer for peer in status["peers"]}
    data = {
        "run": status["run"],
        "rounds": status["rounds_closed"],
        "tokens": ledger["tokens"],
        "seconds": round(facts.seconds, 3),
        "tokens_per_s": round(ledger["tokens"] / facts.seconds, 3) if facts.seconds > 0 else None,
        "loss_first": status["loss_first"],
        "loss_last": status["loss"],
        "heldout_loss": heldout["loss"] if heldout else None,
        "heldout_tokens": heldout["tokens"] if heldout else 0,
        "bits_per_byte": heldout["bits_per_byte"] if heldout else None,
        "unigram_loss": status["unigram_loss"],
        "peers_killed": facts.peers_killed,
        **{key: ledger[key] for key in _FROM_LEDGER},
        "stages": [{"stage": stage, "replicas": count} for stage, count in enumerate(facts.replicas)],
        "peers": [_peer(peer, by_name.get(peer.name)) for peer in facts.started],
        "export_dir": str(facts.export_dir),
        "seed": facts.seed,
    }
    return Summary(data, facts.sample)


_FROM_LEDGER = (
    "peers_joined",
    "tasks_done",
    "tasks_resent",
    "tasks_lost",
    "tokens_dropped",
    "double_counted",
    "averagings_ok",
    "averagings_failed",
    "rounds_solo",
    "rounds_rolled_back",
    "hops",
    "activation_bytes",
)


def progress(status: Mapping[str, Any], *, peers_killed: int) -> str:
    """Return one line about how it goes."""
    here = sum(peer["presence"] == "live" for peer in status["peers"])
    if status["state"] == "waiting":
        waiting = status["notes"].get("run", "waiting for peers")
        return f"{here} peers here, {waiting}"
    heldout, speed = status["heldout"], status["tokens_per_s"]
    words = [
        f"round {status['round']}/{status['num_rounds']}",
        f"loss {_nats(status['loss'])}",
        f"held-out {_nats(heldout['loss'] if heldout else None)}",
        f"{UNKNOWN if speed is None else f'{speed:,.0f}'} tok/s",
        f"{here} peers",
    ]
    words += [f"{peers_killed} killed"] if peers_killed else []
    words += [f"({text})" for text in status["notes"].values()]
    return "  ".join(words)


def model_card_facts(status: Mapping[str, Any], *, exported_round: int | None) -> dict[str, str]:
    """Return the lines that the export's model card gets."""
    heldout = _heldout_at(status, exported_round)
    if heldout is None:
        return {}
    bits = heldout["bits_per_byte"]
    text = f"{heldout['loss']:.4f} nats per token, {bits:.3f} bits per byte, over {heldout['tokens']:,} tokens"
    return {"Held-out loss": text}


def show_summary(summary: Summary, *, say: Callable[[str], None]) -> None:
    """Say how it ended, as a table for people."""
    data = summary.data
    speed = data["tokens_per_s"]
    rows = {
        "trained": f"{data['rounds']} rounds, {data['tokens']:,} tokens in {data['seconds']:.0f} s"
        + ("" if speed is None else f" ({speed:,.0f} tok/s)"),
        "train loss": f"{_nats(data['loss_first'])} -> {_nats(data['loss_last'])} nats per token",
        "held-out": f"{_nats(data['heldout_loss'])} nats per token (unigram {_nats(data['unigram_loss'])})"
        + ("" if data["bits_per_byte"] is None else f", {data['bits_per_byte']:.3f} bits per byte"),
        "swarm": f"{data['peers_joined']} peers joined, {data['peers_killed']} killed; replicas at the end: "
        + ", ".join(str(stage["replicas"]) for stage in data["stages"]),
        "tasks": f"{data['tasks_done']} done, {data['tasks_resent']} sent again, {data['tasks_lost']} lost; "
        f"{data['tokens_dropped']} tokens dropped, {data['double_counted']} counted twice",
        "averaging": f"{data['averagings_ok']} ok, {data['averagings_failed']} failed, {data['rounds_solo']} alone",
        "hops": f"{data['hops']}, {data['activation_bytes'] / 2**20:,.1f} MiB of activations and gradients",
        "model": data["export_dir"],
    }
    for label, text in rows.items():
        say(f"{label:<11} {text}")
    if summary.sample is not None:
        say("sample")
        for line in summary.sample.splitlines():
            say(f"    {line}")


def _heldout_at(status: Mapping[str, Any], round_id: int | None) -> Mapping[str, Any] | None:
    """Return the held-out loss of the state that `round_id` starts from; one of an older round is of another model.

    The round after the last one only evaluates, so what follows it is the state that it has measured.
    """
    heldout: Mapping[str, Any] | None = status["heldout"]
    if heldout is None or round_id is None:
        return None
    return heldout if heldout["round"] == min(round_id, status["num_rounds"]) else None


def _peer(started: StartedPeer, known: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "name": started.name,
        "pid": started.pid,
        "stages": known["stages"] if known else [],
        "tokens": known["tokens"] if known else 0,
        "killed": started.killed,
    }


def _nats(loss: float | None) -> str:
    return UNKNOWN if loss is None else f"{loss:.3f}"
