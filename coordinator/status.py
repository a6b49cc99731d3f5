"""The status document: everything about a run that anybody may see, from the database alone.

Owns: the shape of `swarm.status/1`. Must not know: who asked, or how it is printed (`monitor/`). The same
function answers `StatusRequest`, serves `swarm status DIR` while no coordinator runs, and feeds the demo.

Unknown is null, never a zero. No addresses: the document is meant to be shown.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from coordinator.audit import policy
from coordinator.store import audits, credits, history, peers, receipts, successors, tallies
from coordinator.store.database import Connection
from protocol.control import STATUS_SCHEMA, StatusAnswer
from protocol.ids import PeerId, RoundId
from protocol.manifest import Manifest

MAX_PEERS = 500  # rows; a larger swarm shows its newest, and how many more there are
MAX_EVENTS = MAX_ROLLBACKS = 20
MAX_ANSWER_CHARS = 240_000
FINISHED = "finished_s"
NOTES = "notes"

Document = dict[str, Any]


def document(db: Connection, manifest: Manifest, *, now_s: float) -> Document:
    """Return the status as JSON values."""
    rows = peers.load_peers(db)
    following = successors.all_newest(db)
    people = _people(rows, following)
    replicas = peers.load_replicas(db)
    course = tallies.course(db)
    charters = history.newest_charters(db)
    return {
        "run": manifest.run_id,
        "name": manifest.name,
        "coordinator": manifest.coordinator,
        "state": _state(db, started=bool(charters)),
        "round": _round(manifest, course.newest, replicas, charters),
        "rounds_closed": course.rounds_trained,
        "num_rounds": manifest.batch.num_rounds,
        "loss": course.last.loss if course.last else None,
        "loss_first": course.first.loss if course.first else None,
        "heldout": _heldout(course.evaluated, manifest) if course.evaluated else None,
        "unigram_loss": manifest.data.unigram_loss,
        "tokens_per_s": tallies.tokens_per_s(db),
        "ledger": asdict(tallies.counters(db)),
        "rollbacks": [asdict(rollback) for rollback in tallies.rollbacks(db)[:MAX_ROLLBACKS]],
        "stages": _stages(db, manifest, rows, replicas, charters),
        "peers": _peers(db, people, following, now_s=now_s),
        "peers_omitted": max(0, len(people) - MAX_PEERS),
        "checkpoints": [asdict(row) for row in history.load_checkpoints(db)],
        "notes": json.loads(peers.get_setting(db, NOTES) or "{}"),
        "events": [asdict(event) for event in history.last_events(db, limit=MAX_EVENTS)],
        "at_s": now_s,
    }


def envelope(data: Mapping[str, Any], *, schema: str = STATUS_SCHEMA) -> str:
    """Return the one line that `--json` prints."""
    return json.dumps({"schema": schema, "ok": True, "data": data}, separators=(",", ":"), allow_nan=False)


def answer(data: Document) -> StatusAnswer:
    """Fit a document into a message: a swarm that is too large for one is shown without its peers."""
    text = envelope(data)
    if len(text) > MAX_ANSWER_CHARS:
        omitted = data["peers_omitted"] + len(data["peers"])
        text = envelope({**data, "peers": [], "peers_omitted": omitted, "events": []})
    return StatusAnswer(document=text)


def _state(db: Connection, *, started: bool) -> str:
    if peers.get_setting(db, FINISHED) is not None:
        return "finished"
    return "training" if started else "waiting"


def _round(
    manifest: Manifest,
    newest: RoundId | None,
    replicas: Iterable[peers.ReplicaRow],
    charters: Iterable[history.CharterRow],
) -> int | None:
    """Return the round that is being worked on.

    Members know best: after a restart from a checkpoint they are behind the newest closing. The round after
    the last one only evaluates.
    """
    known: list[int] = [replica.round for replica in replicas if replica.members]
    if not known:
        known = [charter.round for charter in charters] + ([] if newest is None else [newest + 1])
    return min(max(known), manifest.batch.num_rounds) if known else None


def _heldout(tally: tallies.RoundTally, manifest: Manifest) -> Document:
    """Show an evaluation: of the state that `round` starts from, as a checkpoint of that round holds it."""
    assert tally.heldout_loss is not None
    bits_per_byte = tally.heldout_loss / math.log(2) / manifest.data.heldout_bytes_per_token
    return {
        "round": tally.round,
        "loss": tally.heldout_loss,
        "bits_per_byte": bits_per_byte,
        "tokens": tally.heldout_tokens,
    }


def _stages(
    db: Connection,
    manifest: Manifest,
    rows: Iterable[peers.PeerRow],
    replicas: list[peers.ReplicaRow],
    charters: Iterable[history.CharterRow],
) -> list[Document]:
    names = {row.peer: row.name for row in rows if row.presence == "live"}
    generations = {charter.stage: charter.generation for charter in charters}
    averagings = {averaging.stage: averaging for averaging in tallies.last_averagings(db)}
    stages = []
    for stage in range(manifest.model.num_stages):
        here = [replica for replica in replicas if replica.stage == stage and replica.peer in names]
        last = next((averagings[known] for known in averagings if known == stage), None)
        stages.append(
            {
                "stage": stage,
                "generation": next((generations[known] for known in generations if known == stage), None),
                "version": max((replica.version for replica in here), default=None),
                "replicas": [
                    {
                        "name": names[replica.peer],
                        "peer": replica.peer,
                        "round": replica.round,
                        "version": replica.version,
                        "ready": replica.ready,
                        "member": replica.members > 0,
                    }
                    for replica in here
                ],
                "last_averaging": None if last is None else asdict(last),
            }
        )
    return stages


def _people(rows: Iterable[peers.PeerRow], following: Mapping[PeerId, PeerId]) -> list[peers.PeerRow]:
    """Leave out keys that were replaced by one which is in the roster: what was theirs is shown with that."""
    rows = list(rows)
    known = {row.peer for row in rows}
    return [row for row in rows if following.get(row.peer) not in known]


def _peers(
    db: Connection, rows: list[peers.PeerRow], following: Mapping[PeerId, PeerId], *, now_s: float
) -> list[Document]:
    """List the peers that are here first, then the newest of the others."""
    tokens, disputes = Counter[PeerId](), Counter[PeerId]()
    for peer, worked in tallies.tokens_by_peer(db).items():
        tokens[following.get(peer, peer)] += worked
    for peer, (hops, _) in receipts.count_disputes(db).items():
        disputes[following.get(peer, peer)] += hops
    balances = credits.by_person(db)
    standings = {
        peer: policy.state_of(policy.standing_from(peer, fields), now_s=now_s).value
        for peer, fields in audits.load_standings(db).items()
    }
    ordered = sorted(rows, key=lambda row: (row.presence != "live", -row.joined_s, row.peer))
    return [
        {
            "name": row.name,
            "peer": row.peer,
            "presence": row.presence,
            "state": row.state,
            "reason": row.reason,
            "stages": list(row.stages),
            "tokens": tokens[row.peer],
            "credits": asdict(balances.get(row.peer, credits.Balance())),
            "standing": standings.get(row.peer, policy.State.NEW.value),
            "disputed_hops": disputes[row.peer],
            "seen_s_ago": max(0.0, now_s - row.seen_s),
        }
        for row in ordered[:MAX_PEERS]
    ]
