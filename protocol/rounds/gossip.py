"""Keeping up: saying where we stand, noticing that somebody stands elsewhere, and passing on what is missing.

Owns: `Hello`, `Ready`, and the questions and answers about chains and closings; the discovery of forks. Must
not know: ballots. Everything that was lost on the way, or missed while away, is repaired from here. What others
say of a chain counts as the answer to a question of ours, and only members and known hosts of the stage are asked.
"""

from __future__ import annotations

from protocol.ids import Digest, Lineage, PeerId, Version
from protocol.rounds.events import CommitStep, Report, Send, Step, Trouble
from protocol.rounds.lineage import Chain, Link, Relation
from protocol.rounds.member import Member, Standing
from protocol.rounds.messages import (
    MAX_COMMITS_PER_ANSWER,
    AskChain,
    AskClosing,
    ChainAnswer,
    CharterNotice,
    ClosingNotice,
    Committed,
    Goodbye,
    Hello,
    Ready,
)
from protocol.rounds.neighbours import Neighbours
from protocol.rounds.settings import Settings
from protocol.signing import Signed

MAX_ANSWER_BYTES = 128 * 1024  # of commits in one answer: half a message


class Gossip:
    """One replica's talk about lineages."""

    def __init__(self, settings: Settings, member: Member, neighbours: Neighbours) -> None:
        self._settings = settings
        self._member = member
        self._neighbours = neighbours
        self._hello_s = 0.0
        self._ready_s = 0.0
        self._turn = 0
        self._asked_s: dict[PeerId, float] = {}
        self._believed_s: dict[PeerId, float] = {}
        """On whose word we have given up our state, and when."""
        self._forks: dict[PeerId, Lineage] = {}
        """Who stands in another branch than ours, and where."""

    @property
    def rivals(self) -> frozenset[PeerId]:
        """Who of our stage was met in another branch of its lineage, or may have been, and not in ours since."""
        chain = self._member.chain
        return frozenset() if chain is None else frozenset(self._forks.keys() & self._peers(chain))

    @property
    def rival(self) -> Lineage | None:
        """Where one of the `rivals` stands."""
        return min((self._forks[peer] for peer in self.rivals), default=None)

    def tick(self, now_s: float) -> list[Step]:
        """Say hello to somebody now and then; ask for a seat if we have none."""
        chain, timers = self._member.chain, self._settings.timers
        if chain is None:
            return []
        actions: list[Step] = []
        if self._member.standing is Standing.LISTENING and now_s - self._ready_s >= timers.ready_s:
            actions += self.ask_for_seat(now_s)
        if now_s - self._hello_s >= timers.gossip_s:
            self._hello_s = now_s
            actions += self._say_hello(chain)
        return actions

    def ask_for_seat(self, now_s: float) -> list[Step]:
        """Tell the members where we stand, if we have no seat. Also at once after each replay: rounds are short."""
        chain = self._member.chain
        if chain is None or self._member.standing is not Standing.LISTENING or self._member.leaving.is_wanted:
            return []
        self._ready_s = now_s
        return [Send(peer, self._ready(chain)) for peer in sorted(self._peers(chain))]

    # -- what others say ---------------------------------------------------------------------------

    def on_hello(self, sender: PeerId, hello: Hello, now_s: float) -> list[Step]:
        """Compare heads; who is behind gets what it lacks."""
        chain = self._member.chain
        if chain is None:
            return []
        self._neighbours.note_session(chain.head.seats, sender, hello.session)
        actions = self.compare(sender, hello.generation, hello.lineage, hello.version, now_s)
        if self._member.closings.newest_round > hello.closed:
            actions += self.on_ask_closing(sender, hello.closed)
        if hello.lineage == chain.head.lineage:
            actions += self._compare_state(sender, hello)
            actions += self._member.note_heir(sender) if hello.applied and sender in chain.head.members else []
        return actions

    def on_ready(self, sender: PeerId, ready: Ready, now_s: float) -> list[Step]:
        """Remember a joiner that stands where we stand; help one that does not."""
        chain = self._member.chain
        if chain is None:
            return []
        self._neighbours.note_session(chain.head.seats, sender, ready.session)
        if ready.lineage == chain.head.lineage:
            differs = self._compare_state(sender, ready)
            if differs:
                return differs
        self._neighbours.note_ready(sender, ready, now_s)
        return self.compare(sender, ready.generation, ready.lineage, ready.version, now_s)

    def on_goodbye(self, sender: PeerId, _goodbye: Goodbye) -> list[Step]:
        """Stop waiting for that process."""
        if self._member.chain is not None:
            self._neighbours.note_gone(self._member.chain.head.seats, sender)
        return []

    def on_ask_closing(self, sender: PeerId, newest: int) -> list[Step]:
        """Send our newest closing to who has an older one."""
        signed = self._member.closings.newest
        if signed is None or self._member.closings.newest_round <= newest:
            return []
        return [Send(sender, ClosingNotice(stage=self._settings.stage, closing=signed))]

    def on_ask_chain(self, sender: PeerId, ask: AskChain, now_s: float) -> list[Step]:
        """Answer with the commits after the asked lineage, as far as we have them."""
        chain = self._member.chain
        if chain is None:
            return []
        if ask.generation > chain.generation:
            return self._ask(sender, chain, now_s)
        return [Send(sender, self._answer(chain, ask.lineage))]

    def on_answer(self, sender: PeerId, answer: ChainAnswer, now_s: float) -> list[Step]:
        """Follow what we lacked; or find out that we are too old, or on another branch."""
        actions = self._member.on_charter(answer.charter, now_s)
        chain = self._member.chain
        if chain is None or answer.charter != chain.signed_charter:
            return actions
        if not self._was_asked(sender, now_s):  # a hint; also ours, to who shows that it is behind
            return [*actions, *self._ask(sender, chain, now_s)]
        for signed in answer.commits:
            if chain.has(signed):
                continue
            actions += self._member.on_final(signed, (sender,), now_s)
        if answer.known:
            is_more = answer.version > chain.head.version
            return [*actions, *(self._ask(sender, chain, now_s, again=True) if is_more else [])]
        if chain.head.version < answer.oldest_version:
            self._note_parted(sender, answer.lineage)  # or ahead: from here that looks the same
            return [*actions, *self._start_over(sender, now_s)]
        relation = chain.relation(answer.lineage, answer.version)
        parted = relation in (Relation.FORKED, Relation.UNKNOWN)
        return [*actions, *(self._report_fork(sender, answer.lineage) if parted else [])]

    def on_committed(self, sender: PeerId, message: Committed, now_s: float) -> list[Step]:
        """Follow a final commit; if it does not follow our head, ask what lies between."""
        chain = self._member.chain
        if chain is None or chain.has(message.commit):
            return []
        if chain.parent_of(message.commit) != chain.head.lineage:
            return self._ask(sender, chain, now_s)
        return self._member.on_final(message.commit, (sender,), now_s)

    def compare(self, sender: PeerId, generation: int, lineage: Lineage, version: Version, now_s: float) -> list[Step]:
        """React to where somebody else stands."""
        chain = self._member.chain
        if chain is None:
            return []
        if generation != chain.generation:
            if generation > chain.generation:
                return self._ask(sender, chain, now_s)
            return [Send(sender, CharterNotice(stage=self._settings.stage, charter=chain.signed_charter))]
        relation = chain.relation(lineage, version)
        if relation in (Relation.SAME, Relation.BEHIND):
            self._forks.pop(sender, None)
        if relation is Relation.SAME:
            return []
        if relation is Relation.UNKNOWN:
            return self._ask(sender, chain, now_s)
        if relation is Relation.ANCIENT:
            self._note_parted(sender, lineage)
        actions = self._report_fork(sender, lineage) if relation is Relation.FORKED else []
        return [*actions, Send(sender, self._answer(chain, lineage))]

    def on_strange_parent(self, sender: PeerId, parent: Lineage, now_s: float) -> list[Step]:
        """A ballot message is about another lineage than our head: one of us is behind."""
        chain = self._member.chain
        if chain is None:
            return []
        if chain.steps_after(parent):
            return [Send(sender, self._answer(chain, parent))]
        return self._ask(sender, chain, now_s)

    # -- helpers -----------------------------------------------------------------------------------

    def hello(self, head: Link, generation: int) -> Hello:
        """Say where we stand."""
        return Hello(
            stage=self._settings.stage,
            session=self._settings.me.session,
            generation=generation,
            lineage=head.lineage,
            version=head.version,
            applied=self._member.applied is head,
            state_digest=self._state_digest_at(head),
            closed=self._member.closings.newest_round,
        )

    def _say_hello(self, chain: Chain) -> list[Step]:
        """Greet the replicas of our stage in turn, and ask those of the others in turn for closings.

        Stage 0 asks as well: a stage that was restored may have forgotten rounds that others have ended.
        """
        self._turn += 1
        actions: list[Step] = []
        peers = sorted(self._peers(chain))
        if peers:
            peer = peers[self._turn % len(peers)]
            actions.append(Send(peer, self.hello(chain.head, chain.generation)))
        others = sorted(stage for stage in self._neighbours.replicas if stage != self._settings.stage)
        if others:
            stage = others[self._turn % len(others)]
            hosts = sorted(self._neighbours.hosts(stage))
            question = AskClosing(stage=stage, newest=self._member.closings.newest_round)
            actions += [Send(peer, question) for peer in hosts[self._turn // len(others) % max(1, len(hosts)) :][:1]]
        return actions

    def _ready(self, chain: Chain) -> Ready:
        return Ready(
            stage=self._settings.stage,
            session=self._settings.me.session,
            generation=chain.generation,
            lineage=chain.head.lineage,
            version=chain.head.version,
            state_digest=self._state_digest_at(chain.head),
        )

    def _peers(self, chain: Chain) -> set[PeerId]:
        return {*chain.head.members, *self._neighbours.hosts(self._settings.stage)} - {self._settings.me.peer}

    def _state_digest_at(self, head: Link) -> Digest | None:
        applied = self._member.applied
        return self._member.state_digest if applied is not None and applied.lineage == head.lineage else None

    def _compare_state(self, sender: PeerId, word: Hello | Ready) -> list[Step]:
        chain = self._member.chain
        own = self._state_digest_at(chain.head) if chain is not None else None
        if own is None or word.state_digest is None or own == word.state_digest:
            return []
        return [Report(Trouble.DIVERGED, sender, f"another state at version {word.version}")]

    def _answer(self, chain: Chain, lineage: Lineage) -> ChainAnswer:
        steps = chain.steps_after(lineage)
        return ChainAnswer(
            stage=self._settings.stage,
            known=steps is not None,
            charter=chain.signed_charter,
            commits=_as_many_as_fit(steps or ()),
            lineage=chain.head.lineage,
            version=chain.head.version,
            oldest_version=chain.oldest.version,
        )

    def _ask(self, peer: PeerId, chain: Chain, now_s: float, *, again: bool = False) -> list[Step]:
        """Ask a replica of our stage for what comes after our head; not more often than once a beat from anybody."""
        timers = self._settings.timers
        if peer not in self._peers(chain):
            return []
        if not again and now_s - self._asked_s.get(peer, -timers.beat_s) < timers.beat_s:
            return []
        self._asked_s = {other: at_s for other, at_s in self._asked_s.items() if now_s - at_s <= timers.notice_s}
        self._asked_s[peer] = now_s
        question = AskChain(
            stage=self._settings.stage,
            generation=chain.generation,
            lineage=chain.head.lineage,
            version=chain.head.version,
        )
        return [Send(peer, question)]

    def _was_asked(self, peer: PeerId, now_s: float) -> bool:
        asked_s = self._asked_s.get(peer)
        return asked_s is not None and now_s - asked_s <= self._settings.timers.notice_s

    def _start_over(self, peer: PeerId, now_s: float) -> list[Step]:
        """Give up our state on `peer`'s word that no log reaches it any more.

        Nobody can prove that. So it must look true from here, and who says it again before long is not believed.
        """
        isolation_s = self._settings.timers.isolation_s
        self._believed_s = {other: at_s for other, at_s in self._believed_s.items() if now_s - at_s < isolation_s}
        if peer in self._believed_s or not self._member.is_left_behind(now_s):
            return []
        self._believed_s[peer] = now_s
        return self._member.resync(None)

    def _note_parted(self, peer: PeerId, lineage: Lineage) -> bool:
        """Keep in mind that a replica of our stage stands in another branch, or may; tell whether that is news."""
        chain = self._member.chain
        if chain is None or peer not in self._peers(chain) or self._forks.get(peer) == lineage:
            return False
        self._forks = {other: theirs for other, theirs in self._forks.items() if other in self._peers(chain)}
        self._forks[peer] = lineage
        return True

    def _report_fork(self, peer: PeerId, lineage: Lineage) -> list[Step]:
        chain = self._member.chain
        if chain is None or not self._note_parted(peer, lineage):
            return []
        return [Report(Trouble.FORKED, peer, f"{lineage.hex()[:12]} against our {chain.head.lineage.hex()[:12]}")]


def _as_many_as_fit(steps: tuple[CommitStep, ...]) -> tuple[Signed, ...]:
    """Return the first commits, one at least, that together leave room in a message for the charter."""
    chosen: list[Signed] = []
    for step in steps[:MAX_COMMITS_PER_ANSWER]:
        if chosen and sum(len(each.payload) for each in [*chosen, step.signed]) > MAX_ANSWER_BYTES:
            break
        chosen.append(step.signed)
    return tuple(chosen)
