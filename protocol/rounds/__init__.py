"""The round protocol of one stage, without IO: one `RoundMachine` per hosted stage, driven by events.

A driver creates it, calls `handle(event, now_s)` for every fact (`events.py`), and performs the returned
actions in order. `now_s` is any monotonic clock. The machine never blocks, raises for no remote fault, and
forgets everything with its process. `Settings.me.session` must be larger for every machine that is made later
for the same stage and peer, also within one process: promises are kept in memory only.

    machine = RoundMachine(Settings(run=..., stage=stage, me=Seat(peer=me, session=session),
                                    coordinator=..., timers=..., rules=..., notary=KeyNotary(key)))
    async def feed(event):                                # one at a time, in the order things happened
        for action in machine.handle(event, loop.time()):
            match action:
                case Send(to, message): outbox[to].put_nowait(message)        # never awaited here
                case StartReduce(): tasks.create_task(reduce_then_feed(action))
                ...

    driver tells (event)               when
    Tick                               every `timers.beat_s`
    Received(sender, message)          a message of ROUND_MESSAGES came; `message.stage` names the machine,
                                       except ClosingNotice, which goes to every machine of this peer
    RosterChanged                      at the start, and whenever the DHT or the ban list changes
    PeerGone(peer)                     its own host refused a connection (a timeout is not enough)
    Synced                             the stage's state is in place (at start, or after Resync)
    TaskDone                           stage 0: a number that we fed came back with its proof
    Drain, Quit                        the user wants to leave; the process ends now (then send what comes back)
    Rejoin                             policy: give up our branch of a fork

    machine wants (action)             answered by
    Resync(charter, sources)           Synced, as often as it takes; replaces everything that is in flight
    NewLineage                         -  (same state, new name: label snapshots with it)
    OpenRound(round, version, fresh)   -  (take and feed tasks; `fresh`: accumulator to zero, else keep what is frozen)
    Freeze(closing, replaces, following)   Frozen(round, tokens), when nothing is added any more
    Shut(round)                        -  (let no more tasks in; Freeze comes later)
    StartReduce(group)                 ReduceDone(digest, norm of the sum) | ReduceFailed(reason, suspect)
    AbortReduce(group_id)              -
    Fetch(commit, sources)             Fetched(digest, norm) | FetchFailed: bytes into staging, not applied
    Apply(commit)                      Applied | ApplyFailed: staged bytes * clip_scale / total_tokens, log
    Replay(steps, sources)             Applied | ApplyFailed, for the last step
    BitsChanged(round, done)           -  (stage 0: numbers that nobody need feed)
    Send(to, message)                  -  (lost is lost; ClosingNotice to ourselves: for our other machines)
    Left                               Quit, once every machine of this peer has said it
    Report                             -  (log, score, show)

Staging holds one set of bytes: what the last ReduceDone or Fetched announced; it survives until the next
StartReduce, Fetch, Apply or Replay. The update log (bytes by version, with the signed commit) serves
others' Fetch and Replay. Tasks are welcome between OpenRound and Freeze, at exactly that round and version.

The coordinator only writes charters. A restored stage may be chartered for a round that is over already: it asks
the other stages for their newest closing (`AskClosing`), finds its round void, and goes on with the next one.

Read in this order: messages, events, quorum, slot, voter, steward, lineage, member, clock, gossip, machine.
Why it is so: docs/decisions/0005-round-protocol.md. Tormented in tests/sim.
"""

from protocol.rounds.lineage import Chain
from protocol.rounds.machine import RoundMachine, RoundStatistics
from protocol.rounds.member import Standing
from protocol.rounds.messages import ROUND_MESSAGES
from protocol.rounds.settings import KeyNotary, Notary, RoundRules, RoundSize, RoundTimers, Settings

__all__ = [
    "ROUND_MESSAGES",
    "Chain",
    "KeyNotary",
    "Notary",
    "RoundMachine",
    "RoundRules",
    "RoundSize",
    "RoundStatistics",
    "RoundTimers",
    "Settings",
    "Standing",
]
