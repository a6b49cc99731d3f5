"""How fast a swarm trains a model by a recipe, what it sends, and what it waits for. Pure: the whole model of a round.

Owns: `forecast` and its result. Must not know: command lines, files, how a forecast is shown (`report.py`), other
recipes (`advice.py`).

A round of M microbatches takes

    pipeline    the slowest stage's time for M microbatches (`crew.py`), and the way of one microbatch through all
                others and back, without waiting; but not less than M * way / microbatches in flight
    averaging   the busiest member's bytes over its link (`wire.py`). With `overlap` they travel beside the next round's
                microbatches instead, and take their part of the link there
    boundary    four round trips of ballots, an optimizer step that streams, and the hash of the new state
    evaluation  its share of the evaluation that follows every so many rounds: forward passes of held-out text

Replicas of a stage share its microbatches by their speed. A peer computes, sends and receives at the same time.
Checkpoints travel in the background. Left out: faults, the first rounds, and what a processor needs for encoding: where
that counts, measure a stage and a round, and give the seconds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.forecast.crew import Finished, Limit, finish
from coordinator.forecast.memory import Residence
from coordinator.forecast.posts import Post, Replicas, hops_of, posts_of, way_s
from coordinator.forecast.swarm import Model, Peers, Recipe, Swarm
from coordinator.forecast.wire import Traffic
from protocol.manifest import AveragingMode

COMMIT_ROUND_TRIPS = 4  # closing, ping, begin and result, propose (protocol/rounds/steward.py)
WAVES_IN_FLIGHT = 2  # of everybody whose state streams (peer/pipeline/demand.py)
DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersForecast:
    """What one of some peers that are alike does, on average over the stages where they are."""

    peers: Peers
    computing: float
    """Which share of the time."""
    sending: float
    receiving: float
    traffic: Traffic
    """Bytes per round."""
    residence: Residence
    """Of the one with the most state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A round in the middle of training."""

    tokens_per_round: int
    round_s: float
    """Sum of the next four, but for an averaging that is hidden."""
    pipeline_s: float
    averaging_s: float
    """How long averaging takes by itself."""
    boundary_s: float
    evaluation_s: float
    is_averaging_hidden: bool
    way_s: float
    """Of one microbatch through all stages and back."""
    computing: float
    """Which share of the time the busiest stage computes: what links and rounds leave of the cards' speed."""
    limit: Limit
    in_flight: int
    """Microbatches that are under way at most."""
    activation_bytes_per_token: float
    """Of all peers together, sent; as many are received. So for averaging."""
    averaging_bytes_per_token: float
    checkpoint_bytes_per_token: float
    """Sent to the coordinator."""
    local_steps: float | None
    """`diloco`: optimizer steps that a replica takes in a round, where it has the most others beside it."""
    peers: tuple[PeersForecast, ...]
    """In the order of the swarm's."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_round / self.round_s

    @property
    def bytes_per_token(self) -> float:
        """What all peers together send."""
        return self.activation_bytes_per_token + self.averaging_bytes_per_token + self.checkpoint_bytes_per_token

    def days(self, tokens: float) -> float:
        """Return how long so many tokens take."""
        return tokens / self.tokens_per_s / DAY_S


def forecast(swarm: Swarm, model: Model, recipe: Recipe) -> Forecast:
    """Return what to expect. Raises `ConfigError` if the model does not fit the swarm, `ModelError` if not its cut."""
    return _Round(swarm, model, recipe, posts_of(swarm, model, recipe)).forecast()


@dataclass(frozen=True, slots=True)
class _Work:
    """What becomes of a round's microbatches at one post."""

    post: Post
    training: Finished
    evaluating: Finished


@dataclass(frozen=True, slots=True)
class _Round:
    """A round, put together from its posts."""

    swarm: Swarm
    model: Model
    recipe: Recipe
    posts: Sequence[Post]

    def forecast(self) -> Forecast:
        batch = self.recipe.batch
        works = [self._work(post) for post in self.posts]
        between = hops_of(self.model, self.recipe, len(self.posts))
        way = way_s(self.posts, between, ping_s=self._ping_s)
        slowest = max(works, key=lambda work: work.training.seconds - work.post.own_s(work.post.fastest))
        in_flight = min(self._in_flight(), batch.microbatches_per_round)
        filled_s = max(0.0, slowest.training.seconds - slowest.post.own_s(slowest.post.fastest)) + way
        pipeline_s = max(filled_s, batch.microbatches_per_round * way / in_flight)
        averaging_s, averaging_limit = self._averaging()
        exposed_s = 0.0 if self.recipe.averaging.overlap else averaging_s
        boundary_s = self._boundary_s()
        evaluation_s = max(work.evaluating.seconds for work in works) / batch.eval_every
        round_s = pipeline_s + exposed_s + boundary_s + evaluation_s
        waits: dict[Limit, float] = defaultdict(float, {self._limit(slowest): slowest.training.seconds})
        waits[Limit.PIPELINE] += pipeline_s - slowest.training.seconds
        waits[averaging_limit] += exposed_s
        waits[Limit.BOUNDARY] += boundary_s
        return Forecast(
            tokens_per_round=batch.tokens_per_round,
            round_s=round_s,
            pipeline_s=pipeline_s,
            averaging_s=averaging_s,
            boundary_s=boundary_s,
            evaluation_s=evaluation_s,
            is_averaging_hidden=self.recipe.averaging.overlap,
            way_s=way,
            computing=max(self._busy_s(work) for work in works) / round_s,
            limit=max(waits, key=lambda limit: waits[limit]),
            in_flight=in_flight,
            **self._bytes_per_token(),
            local_steps=self._local_steps(),
            peers=self._peers(works, round_s=round_s),
        )

    def _work(self, post: Post) -> _Work:
        training = finish([(post.load(each), each.count) for each in post.replicas], self._num_training)
        evaluating = finish([(post.evaluation_load(each), each.count) for each in post.replicas], self._num_evaluations)
        return _Work(post, training, evaluating)

    @property
    def _num_training(self) -> int:
        return self.recipe.batch.microbatches_per_round

    @property
    def _num_evaluations(self) -> int:
        return self.recipe.batch.microbatches_per_evaluation

    @property
    def _ping_s(self) -> float:
        return self.swarm.ping_ms / 1000

    def _in_flight(self) -> int:
        """Count what the replicas of stage 0 keep under way, as peer/span_parts.py and peer/pipeline/demand.py do."""
        feeders, *behind = self.posts
        if self.swarm.in_flight is not None:
            return feeders.count * self.swarm.in_flight
        own = sum(
            each.count * max(self.model.num_stages + 1, WAVES_IN_FLIGHT * each.residence.wave)
            for each in feeders.replicas
        )
        wanted = (each.count * each.residence.wave for post in behind for each in post.replicas)
        return own + WAVES_IN_FLIGHT * sum(wave for wave in wanted if wave > 1)

    def _limit(self, work: _Work) -> Limit:
        loads = [work.post.load(each) for each in work.post.replicas]
        ends = zip(loads, work.training.shares, strict=True)
        load, share = max(ends, key=lambda end: end[0].finish_s(math.ceil(end[1])))
        return load.limit(share)

    def _averaging(self) -> tuple[float, Limit]:
        each = [post.averaging_s(replicas) for post in self.posts for replicas in post.replicas]
        up_s, down_s = max(times.up for times in each), max(times.down for times in each)
        return max(up_s, down_s), Limit.UPLOAD if up_s >= down_s else Limit.DOWNLOAD

    def _boundary_s(self) -> float:
        if self.swarm.boundary_s is not None:
            return self.swarm.boundary_s
        step_s = max(replicas.step_s for post in self.posts for replicas in post.replicas)
        return COMMIT_ROUND_TRIPS * self._ping_s + step_s

    def _local_steps(self) -> float | None:
        spec = self.recipe.averaging
        if spec.mode is not AveragingMode.DILOCO:
            return None
        return self._num_training / max(post.count for post in self.posts) / spec.microbatches_per_step

    def _bytes_per_token(self) -> dict[str, float]:
        every, tokens = self.recipe.batch.eval_every, self.recipe.batch.tokens_per_round
        activations = sum(
            self._num_training * post.training.up + self._num_evaluations / every * post.evaluating.up
            for post in self.posts
        )
        return {
            "activation_bytes_per_token": activations / tokens,
            "averaging_bytes_per_token": sum(post.count * post.averaging.mean for post in self.posts) / tokens,
            "checkpoint_bytes_per_token": sum(post.count * post.checkpoint_bytes for post in self.posts) / tokens,
        }

    # -- who does how much ------------------------------------------------------------------------------

    def _busy_s(self, work: _Work) -> float:
        """Return how long the replicas of a post compute in a round, on average."""
        total = sum(each.count * seconds for each, seconds, _ in self._each(work))
        return total / work.post.count

    def _each(self, work: _Work) -> list[tuple[Replicas, float, Traffic]]:
        """Return for each kind of a post's replicas how long one computes in a round, and what it exchanges."""
        post, every, found = work.post, self.recipe.batch.eval_every, []
        for each, trained, evaluated in zip(post.replicas, work.training.shares, work.evaluating.shares, strict=True):
            seconds = trained * each.training_s + evaluated / every * each.evaluating_s
            traffic = post.training.times(trained).plus(post.evaluating.times(evaluated / every))
            beside = Traffic(post.averaging.mean + post.checkpoint_bytes, post.averaging.mean)
            found.append((each, seconds, traffic.plus(beside)))
        return found

    def _peers(self, works: Sequence[_Work], *, round_s: float) -> tuple[PeersForecast, ...]:
        seconds: dict[int, float] = defaultdict(float)
        traffic: dict[int, Traffic] = defaultdict(Traffic)
        fullest: dict[int, Residence] = {}
        for each, computing_s, sent in (entry for work in works for entry in self._each(work)):
            seconds[each.kind] += each.count * computing_s
            traffic[each.kind] = traffic[each.kind].plus(sent.times(each.count))
            known = fullest.get(each.kind, each.residence)
            fullest[each.kind] = max(known, each.residence, key=lambda home: home.total_bytes)
        found = []
        for kind, peers in enumerate(self.swarm.peers):
            mean = traffic[kind].times(1 / peers.count)
            found.append(
                PeersForecast(
                    peers=peers,
                    computing=seconds[kind] / peers.count / round_s,
                    sending=mean.up / peers.upload_bytes_per_s / round_s,
                    receiving=mean.down / peers.download_bytes_per_s / round_s,
                    traffic=mean,
                    residence=fullest[kind],
                )
            )
        return tuple(found)
