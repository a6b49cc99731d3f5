"""Who hosts which part of the model, and what a microbatch takes there. Pure.

Owns: `Post`: a span with its replicas, their bytes and their seconds. Must not know: how a round is put together
(`forecast.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.forecast.crew import Load
from coordinator.forecast.memory import Residence, residence, shared_bytes
from coordinator.forecast.spans import Span
from coordinator.forecast.swarm import Model, Peers, Recipe, Swarm
from coordinator.forecast.wire import Averaging, Hop, Traffic, at_span, averaging, hops
from protocol.errors import ConfigError
from protocol.ids import StageId
from protocol.rounds.choice import choose_codec

HOP_ROUND_TRIPS = 3  # a stream is opened, a slot is asked for, the body goes and the answer comes
HASH_BYTES_PER_S = 1.2e9  # docs/results.md, `pipeline`


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """Those of one kind at a post. Seconds are of one of them."""

    kind: int
    """Which of the swarm's peers."""
    peers: Peers
    count: int
    residence: Residence
    training_s: float
    """Computing for a microbatch, with everything on the device."""
    evaluating_s: float
    step_s: float
    """From an average to the hash of the state that it leads to."""

    @property
    def streamed_s(self) -> float:
        """Copying for a microbatch, beside computing."""
        return self.residence.wave_s / self.residence.wave

    @property
    def wave_s(self) -> float:
        """From the first microbatch of a wave to the end of all of them."""
        return self.residence.wave * max(self.training_s, self.streamed_s)

    def transfer_s(self, traffic: Traffic) -> Traffic:
        """Return how long bytes take on the link, each way."""
        return Traffic(traffic.up / self.peers.upload_bytes_per_s, traffic.down / self.peers.download_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """A span, by whom it is hosted, and what each of them exchanges."""

    span: Span
    replicas: tuple[Replicas, ...]
    training: Traffic
    """Bytes per microbatch."""
    evaluating: Traffic
    averaging: Averaging
    checkpoint_bytes: float
    """Of one replica per round."""
    is_averaging_hidden: bool

    @property
    def count(self) -> int:
        return sum(each.count for each in self.replicas)

    @property
    def fastest(self) -> Replicas:
        return min(self.replicas, key=lambda each: self.load(each).service_s)

    def load(self, replicas: Replicas) -> Load:
        """Return what training takes of one of these, with all that travels beside it."""
        transfer_s, beside_s = replicas.transfer_s(self.training), replicas.transfer_s(self._beside)
        return Load(
            compute_s=max(replicas.training_s, replicas.streamed_s),
            upload_s=transfer_s.up,
            download_s=transfer_s.down,
            round_upload_s=beside_s.up,
            round_download_s=beside_s.down,
            streams=replicas.streamed_s > replicas.training_s,
        )

    def evaluation_load(self, replicas: Replicas) -> Load:
        """Return what an evaluation's microbatch takes: one pass, for which weights come once instead of twice."""
        transfer_s = replicas.transfer_s(self.evaluating)
        return Load(
            compute_s=max(replicas.evaluating_s, replicas.streamed_s / 2),
            upload_s=transfer_s.up,
            download_s=transfer_s.down,
        )

    def own_s(self, replicas: Replicas) -> float:
        """Return what one of these adds at most to a microbatch's way."""
        return max(replicas.wave_s, *replicas.transfer_s(self.training))

    def averaging_s(self, replicas: Replicas) -> Traffic:
        """Return how long one of these sends and receives in an averaging by itself."""
        return replicas.transfer_s(self._averaged)

    @property
    def _averaged(self) -> Traffic:
        return Traffic(self.averaging.busiest, self.averaging.busiest)

    @property
    def _beside(self) -> Traffic:
        checkpoints = Traffic(up=self.checkpoint_bytes)
        return checkpoints.plus(self._averaged) if self.is_averaging_hidden else checkpoints


def posts_of(swarm: Swarm, model: Model, recipe: Recipe) -> tuple[Post, ...]:
    """Put the peers to their posts. Raises `ConfigError` if there are too few of them, or their memory is too small."""
    if model.num_stages % swarm.stages_per_peer:
        raise ConfigError(
            f"{model.num_stages} stages cannot be dealt out {swarm.stages_per_peer} to a peer.",
            hint="Only a divisor of the number of stages can be planned.",
        )
    spans = model.spans(swarm.stages_per_peer)
    if swarm.num_peers < len(spans):
        raise ConfigError(
            f"{swarm.num_peers} peers cannot host {model.num_stages} stages, {swarm.stages_per_peer} each.",
            hint="Take more peers, fewer stages, or more stages per peer.",
        )
    training, evaluating = hops_of(model, recipe, len(spans)), hops_of(model, recipe, len(spans), trains=False)
    crews, stages = swarm.crews(len(spans)), model.spans(1)
    replicas = [_replicas(swarm, recipe, span, crew) for span, crew in zip(spans, crews, strict=True)]
    computing_s = max(_computing_s(each, recipe) for each in replicas)
    posts = []
    for index, (span, crew) in enumerate(zip(spans, crews, strict=True)):
        count = sum(crew.values())
        averaged = [
            _averaging(stages[stage], stage, replicas[index], recipe, computing_s=computing_s) for stage in span.stages
        ]
        posts.append(
            Post(
                span=span,
                replicas=replicas[index],
                training=at_span(training, index),
                evaluating=at_span(evaluating, index),
                averaging=Averaging(sum(each.mean for each in averaged), sum(each.busiest for each in averaged)),
                checkpoint_bytes=shared_bytes(span, recipe) / recipe.keeping.checkpoint_every / count,
                is_averaging_hidden=recipe.averaging.overlap,
            )
        )
    return tuple(posts)


def hops_of(model: Model, recipe: Recipe, num_spans: int, *, trains: bool = True) -> tuple[Hop, ...]:
    """Return what a microbatch costs between each span and the next."""
    num_elements = recipe.batch.tokens_per_microbatch * model.width
    return hops(recipe.averaging.hop_codecs, num_elements, num_spans=num_spans, trains=trains)


def way_s(posts: Sequence[Post], between: Sequence[Hop], *, ping_s: float) -> float:
    """Return how long a microbatch takes through the fastest replica of every post and back, if it never waits."""
    fastest = [post.fastest for post in posts]
    seconds = sum(each.wave_s for each in fastest)
    for hop, before, behind in zip(between, fastest, fastest[1:], strict=False):
        there = min(before.peers.upload_bytes_per_s, behind.peers.download_bytes_per_s)
        back = min(behind.peers.upload_bytes_per_s, before.peers.download_bytes_per_s)
        seconds += hop.forward / there + hop.backward / back + HOP_ROUND_TRIPS * ping_s
    return seconds


def _computing_s(replicas: Sequence[Replicas], recipe: Recipe) -> float:
    """Return how long these compute a round's microbatches, shared out by their speed."""
    per_s = sum(each.count / max(each.training_s, each.streamed_s) for each in replicas)
    return recipe.batch.microbatches_per_round / per_s


def _averaging(
    span: Span, stage: int, replicas: Sequence[Replicas], recipe: Recipe, *, computing_s: float
) -> Averaging:
    """Return what averaging one stage takes, in the codec that its members are told to use, or would choose."""
    spec, members = recipe.averaging, sum(each.count for each in replicas)
    codec = choose_codec(
        spec.codecs_of(StageId(stage)),
        num_elements=span.num_elements // spec.fragments,
        num_members=members,
        bytes_per_s=min(each.peers.upload_bytes_per_s for each in replicas),
        round_s=computing_s,
        is_hidden=spec.overlap,
    )
    return averaging(codec, span, members=members, fragments=spec.fragments)


def _replicas(swarm: Swarm, recipe: Recipe, span: Span, crew: Mapping[int, int]) -> tuple[Replicas, ...]:
    length, tokens = recipe.batch.sequence_length, recipe.batch.tokens_per_microbatch
    training_flop = span.training_flop(length, recomputes=swarm.recomputes)
    forward_share = span.forward_flop(length) / training_flop
    wave = min(swarm.wave, -(-recipe.batch.microbatches_per_round // sum(crew.values())))
    found = []
    for kind, count in crew.items():
        peers = swarm.peers[kind]
        is_measured = bool(peers.stage_seconds)
        training_s = (
            sum(map(peers.seconds_of, span.stages)) if is_measured else tokens * training_flop / (peers.tflops * 1e12)
        )
        home = residence(peers, span, recipe, wave=wave)
        if is_measured:  # whatever had to stream was streaming
            home = home.standing()
        found.append(
            Replicas(
                kind=kind,
                peers=peers,
                count=count,
                residence=home,
                training_s=training_s,
                evaluating_s=forward_share * training_s,
                step_s=home.step_s + shared_bytes(span, recipe) / HASH_BYTES_PER_S,
            )
        )
    return tuple(found)
