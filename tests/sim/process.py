"""A simulated peer process: alive or dead, running or stopped, with one replica per stage of its span.

Owns: delivery of messages and timers to what lives in it. Everything scheduled by a life of the process ends
with that life; while it is stopped everything waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.ids import PeerId, StageId
from protocol.rounds.events import Drain, Event, PeerGone, Quit, Received, RosterChanged, Tick
from protocol.rounds.messages import ClosingNotice, Seat, StageMessage
from tests.sim.pipeline import Pipeline
from tests.sim.replica import Replica

if TYPE_CHECKING:
    from tests.sim.world import World


class Process:
    """One peer."""

    def __init__(self, world: World, name: PeerId, stages: tuple[StageId, ...]) -> None:
        self.world = world
        self.name = name
        self.stages = stages
        self.alive = False
        self.paused = False
        self.draining = False
        self.banned: frozenset[PeerId] = frozenset()
        self.session = 0
        self.replicas: dict[StageId, Replica] = {}
        self.pipeline = Pipeline(self)
        self.seen_s = 0.0
        self._waiting: list[Callable[[], None]] = []

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin a new life: a new session, no memory."""
        self.alive, self.paused, self.draining, self._waiting = True, False, False, []
        self.session = self.world.new_session()
        self.pipeline = Pipeline(self)
        me = Seat(peer=self.name, session=self.session)
        self.replicas = {stage: Replica(self, stage, self.world.settings_for(stage, me)) for stage in self.stages}
        self.tell_roster()
        self.later(self.world.rng.uniform(0, self.world.timers.beat_s), self._beat)

    def kill(self) -> None:
        """SIGKILL: no goodbye, no memory; the host refuses connections from now on."""
        self.alive = False
        for stage, replica in self.replicas.items():
            self.world.checks.on_death(stage, replica)
        self.replicas = {}

    def leave(self) -> None:
        """End in peace, once every stage of ours has said that it may."""
        if self.alive and all(replica.has_left for replica in self.replicas.values()):
            self.feed_all(Quit())
            self.kill()

    def drain(self) -> None:
        """Ask every replica to leave."""
        self.draining = True
        self.feed_all(Drain())

    def hear_of_ban(self, peer: PeerId) -> None:
        """The coordinator has told us; we end if it is about us."""
        self.banned |= {peer}
        if peer != self.name:
            self.tell_roster()
        elif self.alive:
            self.kill()

    def pause(self) -> None:
        """SIGSTOP."""
        self.paused = True

    def resume(self) -> None:
        """SIGCONT: what has piled up is worked off, in any order."""
        self.paused = False
        waiting, self._waiting = self._waiting, []
        self.world.rng.shuffle(waiting)
        for job in waiting:
            self._run(self.session, job)

    def answers(self, asker: PeerId) -> bool:
        """Tell whether `asker` could fetch something from us now."""
        return self.alive and not self.paused and self.world.network.connects(asker, self.name)

    # -- time and messages -------------------------------------------------------------------------

    def later(self, delay_s: float, job: Callable[[], None]) -> None:
        """Do something in this life of the process."""
        session = self.session
        self.world.at(delay_s, lambda: self._run(session, job))

    def _run(self, session: int, job: Callable[[], None]) -> None:
        if not self.alive or self.session != session:
            return
        if self.paused:
            self._waiting.append(job)
        else:
            job()

    def send(self, to: PeerId, message: StageMessage) -> None:
        """Hand a message to the network. A dead process's host refuses the connection, which we notice."""
        if to == self.name:
            self.deliver(self.name, message)
            return
        target = self.world.processes.get(to)
        if target is None:
            return
        if self.world.options.through_wire:
            message = type(message).from_bytes(message.to_bytes())
        for delay_s in self.world.network.fates(self.name, to, type(message).__name__):
            self.world.at(delay_s, lambda: target.receive(self, message))

    def receive(self, sender: Process, message: StageMessage) -> None:
        """A message has arrived at our host."""
        if self.alive:
            self._run(self.session, lambda: self.deliver(sender.name, message))
        elif self.world.options.hosts_refuse and self.world.network.connects(self.name, sender.name):
            sender.later(self.world.network.link.delay_s, lambda: sender.feed_all(PeerGone(self.name)))

    def deliver(self, sender: PeerId, message: StageMessage) -> None:
        """Hand a message to the replica that it is for; a closing is for all of them."""
        if isinstance(message, ClosingNotice):
            for stage, replica in list(self.replicas.items()):
                if sender != self.name or stage != message.stage:
                    replica.feed(Received(sender, message))
        elif message.stage in self.replicas:
            self.replicas[message.stage].feed(Received(sender, message))

    def feed_all(self, event: Event) -> None:
        """Tell all our replicas."""
        for replica in list(self.replicas.values()):
            replica.feed(event)

    def tell_roster(self) -> None:
        """What the DHT says, some seconds late."""
        self.feed_all(RosterChanged(self.world.directory(), self.banned))

    def _beat(self) -> None:
        self.seen_s = self.world.now_s
        for replica in list(self.replicas.values()):
            replica.feed(Tick())
        self.later(self.world.timers.beat_s, self._beat)
