"""coordinator/forecast/forecast.py: the whole model of a round.

Oracle: arithmetic on paper, for swarms so simple that it can be done. What is general is stated as a property.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.forecast.crew import Limit
from coordinator.forecast.forecast import forecast
from coordinator.forecast.spans import spans_of
from coordinator.forecast.swarm import Peers, Recipe, Swarm
from coordinator.forecast.wire import averaging, hops
from coordinator.placement import Host, place
from protocol.errors import ConfigError, ModelError
from protocol.ids import PeerId
from tests.coordinator.forecast.asks import FAST, mbps, model, recipe, swarm

TOKENS = 2 * 256  # of a microbatch
NUMBERS = TOKENS * 512  # of its activations
BODY_BYTES = 4 * NUMBERS
ABOUT = 0.002  # messages around a body of a mebibyte weigh a thousandth of it


# -- one stage ------------------------------------------------------------------------------------------


def test_one_peer_with_all_stages_only_computes() -> None:
    """Oracle: 12 microbatches of a second each."""
    found = forecast(swarm(), model(), recipe())
    assert found.round_s == pytest.approx(12.0)
    assert found.tokens_per_s == pytest.approx(TOKENS)
    assert found.computing == pytest.approx(1.0)
    assert found.limit is Limit.COMPUTE
    assert found.bytes_per_token == pytest.approx(0.0, abs=1e-3)
    assert found.days(86_400 * TOKENS) == pytest.approx(1.0)


def test_a_card_computes_six_or_eight_operations_per_parameter() -> None:
    """Oracle: 6 P per token for the head, 8 P for layers with recomputation, and causal attention, at 2 TFLOP/s."""
    layers, head, query = 8 * (4 * 512 * 512 + 3 * 512 * 1376), 4096 * 512, 8 * 512
    peers = Peers(count=1, tflops=2.0)
    for recomputes, passes in ((True, 4), (False, 3)):
        found = forecast(swarm(peers, recomputes=recomputes), model(), recipe())
        flop = passes * (2 * layers + 2 * 256 * query) + 6 * head
        assert found.round_s == pytest.approx(12 * TOKENS * flop / 2e12, rel=1e-6)


def test_replicas_share_the_work() -> None:
    """Oracle: 12 microbatches, three at a time; links take no time, and gradients weigh what they weigh."""
    found = forecast(swarm(replace(FAST, count=3)), model(), recipe())
    assert found.round_s == pytest.approx(4.0)
    span = spans_of(model().config, 1)[0]
    assert found.averaging_bytes_per_token == pytest.approx(4 * span.num_elements * 4 / (12 * TOKENS), rel=0.001)


def test_a_slower_replica_does_less() -> None:
    """Oracle: in 9 s the fast one does 9, one that takes three times as long 3."""
    found = forecast(swarm(FAST, replace(FAST, stage_seconds=(3.0,))), model(), recipe())
    assert found.round_s == pytest.approx(9.0)
    assert [peers.computing for peers in found.peers] == [pytest.approx(1.0), pytest.approx(1.0)]


def test_averaging_adds_its_time_unless_it_is_hidden() -> None:
    """Oracle: two members send and receive the whole gradient once; 1 MB/s up, 4 MB/s down."""
    peers = replace(FAST, count=2, upload_mbps=mbps(1e6), download_mbps=mbps(4e6))
    gradient_s = averaging("fp32", spans_of(model().config, 1)[0], members=2).mean / 1e6
    found = forecast(swarm(peers), model(), recipe())
    assert found.averaging_s == pytest.approx(gradient_s)
    assert found.round_s == pytest.approx(6.0 + gradient_s)
    assert found.limit is Limit.UPLOAD
    assert found.peers[0].sending == pytest.approx(gradient_s / found.round_s, rel=1e-3)
    assert found.peers[0].receiving == pytest.approx(gradient_s / 4 / found.round_s, rel=1e-3)
    hidden = forecast(swarm(peers), model(), recipe(averaging__overlap=True))
    assert hidden.round_s == pytest.approx(gradient_s)
    few = recipe(averaging__overlap=True, batch__microbatches_per_round=2 * 200)
    assert forecast(swarm(peers), model(), few).round_s == pytest.approx(200.0)


def test_sparse_averages_cost_a_copy_for_every_other_member() -> None:
    """Oracle: 104 bytes for 4,096 numbers, to each of three others, at 1 MB/s."""
    peers = replace(FAST, count=4, upload_mbps=mbps(1e6))
    found = forecast(swarm(peers), model(), recipe(averaging__mode="diloco", averaging__codec="sparse"))
    num_elements = spans_of(model().config, 1)[0].num_elements
    assert found.averaging_s == pytest.approx(3 * num_elements * 104 / 4096 / 1e6, rel=0.01)
    assert found.local_steps == 3.0


def test_fragments_cost_their_share_of_a_round() -> None:
    """Oracle: the same swarm with the whole stage in every round."""
    peers = replace(FAST, count=4, upload_mbps=mbps(1e6))
    whole = forecast(swarm(peers), model(), recipe(averaging__mode="diloco", averaging__codec="int8"))
    third = forecast(
        swarm(peers), model(), recipe(averaging__mode="diloco", averaging__codec="int8", averaging__fragments=3)
    )
    assert third.averaging_s == pytest.approx(whole.averaging_s / 3)
    assert third.averaging_bytes_per_token == pytest.approx(whole.averaging_bytes_per_token / 3)


# -- hops -------------------------------------------------------------------------------------------------


def test_two_stages_fill_and_drain() -> None:
    """Oracle: M + S - 1 (GPipe): the last of 12 enters after 12 s, and has another second to go."""
    found = forecast(swarm(replace(FAST, count=2)), model(2), recipe())
    assert found.way_s == pytest.approx(2.0)
    assert found.round_s == pytest.approx(13.0)
    assert found.computing == pytest.approx(12 / 13)


def test_a_measured_stage_may_differ_from_others() -> None:
    found = forecast(swarm(replace(FAST, count=2, stage_seconds=(1.0, 3.0))), model(2), recipe())
    assert found.round_s == pytest.approx(1.0 + 12 * 3.0)


def test_links_decide_where_they_are_slower_than_cards() -> None:
    """Oracle: each of two peers sends a body per microbatch: 2 MiB, at 100 kB/s."""
    peers = replace(FAST, count=2, upload_mbps=mbps(1e5))
    found = forecast(swarm(peers, in_flight=12), model(2), recipe())
    body_s = BODY_BYTES / 1e5
    assert found.pipeline_s == pytest.approx(12 * body_s + 2.0 + body_s, rel=ABOUT)
    assert found.limit is Limit.UPLOAD
    assert found.peers[0].sending == pytest.approx(12 * body_s / found.round_s, rel=ABOUT)


def test_a_middle_stage_sends_twice() -> None:
    """Oracle: three stages; the middle one sends activations on and gradients back."""
    peers = replace(FAST, count=3, upload_mbps=mbps(1e5))
    found = forecast(swarm(peers, in_flight=12), model(3), recipe())
    body_s = BODY_BYTES / 1e5
    assert found.pipeline_s == pytest.approx(12 * 2 * body_s + 3.0 + 2 * body_s, rel=ABOUT)


def test_too_few_under_way_leave_everybody_waiting() -> None:
    """Oracle: Little's law: two under way, each 2 s and two bodies of 1 s on its way."""
    peers = replace(FAST, count=2, upload_mbps=mbps(BODY_BYTES))
    found = forecast(swarm(peers, in_flight=2), model(2), recipe())
    assert found.way_s == pytest.approx(4.0, rel=ABOUT)
    assert found.pipeline_s == pytest.approx(12 * 4.0 / 2, rel=ABOUT)
    assert forecast(swarm(peers), model(2), recipe()).in_flight == 3, "stages + 1, as peers do"


def test_latency_lengthens_the_way_and_the_boundary() -> None:
    """Oracle: three round trips per hop and four between rounds, of 100 ms."""
    peers = replace(FAST, count=2)
    found = forecast(swarm(peers, ping_ms=100.0), model(2), recipe())
    assert found.pipeline_s == pytest.approx(13.0 + 3 * 0.1)
    assert forecast(swarm(peers, ping_ms=100.0, boundary_s=None), model(2), recipe()).boundary_s > 0.4


def test_bytes_per_token_are_counted_once() -> None:
    """Oracle: two bodies per microbatch and hop, whoever sends them."""
    found = forecast(swarm(replace(FAST, count=3)), model(3), recipe())
    assert found.activation_bytes_per_token == pytest.approx(2 * 2 * BODY_BYTES / TOKENS, rel=ABOUT)
    exact = sum(hop.forward + hop.backward for hop in hops(("fp32", "fp32"), NUMBERS, num_spans=3)) / TOKENS
    assert found.activation_bytes_per_token == pytest.approx(exact)
    sent = sum(peers.peers.count * peers.traffic.up for peers in found.peers)
    assert sent / found.tokens_per_round == pytest.approx(found.bytes_per_token)


def test_several_stages_on_a_peer_are_one_to_the_links() -> None:
    """Oracle: four stages on two peers exchange what two stages exchange, and compute twice as long."""
    peers = replace(FAST, count=2)
    found = forecast(swarm(peers, stages_per_peer=2), model(4), recipe())
    two = forecast(swarm(replace(peers, stage_seconds=(2.0,))), model(2), recipe())
    assert found.round_s == pytest.approx(two.round_s)
    assert found.activation_bytes_per_token == two.activation_bytes_per_token


# -- what else takes time ---------------------------------------------------------------------------------


def test_an_evaluation_is_a_forward_pass_now_and_then() -> None:
    """Oracle: without recomputation forward is a third; 6 microbatches after every other round: one second a round."""
    spec = recipe(batch__eval_every=2, batch__heldout_sequences=12)
    found = forecast(swarm(recomputes=False), model(), spec)
    assert found.evaluation_s == pytest.approx(6 / 3 / 2)
    assert found.round_s == pytest.approx(13.0)


def test_checkpoints_travel_beside() -> None:
    """Oracle: weights and both moments in fp32, 12 bytes per parameter, every other round."""
    spec = recipe(keeping__checkpoint_every=2, optimizer__name="adamw32")
    found = forecast(swarm(), model(), spec)
    num_elements = spans_of(model().config, 1)[0].num_elements
    assert found.checkpoint_bytes_per_token == pytest.approx(12 * num_elements / 2 / (12 * TOKENS))
    assert found.round_s == pytest.approx(12.0)


def test_what_was_measured_between_rounds_is_taken_as_it_is() -> None:
    assert forecast(swarm(boundary_s=2.5), model(), recipe()).round_s == pytest.approx(14.5)


def test_state_that_streams_can_take_longer_than_computing() -> None:
    """Oracle: nothing fits the device. In a wave of 4, weights come twice and gradients once: 12 bytes at 1 GB/s."""
    peers = Peers(count=1, tflops=1e6, device_bytes=0, pcie_gb_per_s=1.0, upload_mbps=1e9, download_mbps=1e9)
    found = forecast(swarm(peers, wave=4), model(), recipe(optimizer__name="adamw32"))
    num_elements = spans_of(model().config, 1)[0].num_elements
    assert found.pipeline_s == pytest.approx(12 / 4 * 12 * num_elements / 1e9, rel=1e-3)
    assert found.limit is Limit.MEMORY
    assert found.computing < 0.01


# -- who is where -------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=3), num_spans=st.integers(1, 5))
def test_peers_are_where_the_coordinator_would_put_them(counts: list[int], num_spans: int) -> None:
    """Oracle: `coordinator/placement.py`, one joiner after the other."""
    hosts: list[Host] = []
    expected: list[dict[int, int]] = [{} for _ in range(num_spans)]
    for kind, count in enumerate(counts):
        for _ in range(count):
            (stage,) = place((), hosts, num_stages=num_spans)
            hosts.append(Host(peer=PeerId(str(len(hosts))), stages=(stage,)))
            expected[stage][kind] = expected[stage].get(kind, 0) + 1
    everybody = Swarm(peers=tuple(Peers(count=count) for count in counts))
    assert list(everybody.crews(num_spans)) == expected


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 peers cannot host 2 stages"):
        forecast(swarm(), model(2), recipe())
    with pytest.raises(ConfigError, match="cannot be dealt out"):
        forecast(swarm(replace(FAST, count=9), stages_per_peer=2), model(3), recipe())
    with pytest.raises(ModelError, match="cannot be cut"):
        forecast(swarm(replace(FAST, count=99)), model(99), recipe())


# -- in general ---------------------------------------------------------------------------------------------

peers_of = st.builds(
    Peers,
    count=st.integers(1, 6),
    upload_mbps=st.floats(1.0, 1e4),
    download_mbps=st.floats(1.0, 1e4),
    tflops=st.floats(0.01, 100.0),
)
recipes = st.builds(
    recipe,
    averaging__mode=st.just("diloco"),
    averaging__codec=st.sampled_from(["fp32", "fp16", "int8", "int4", "sparse"]),
    averaging__activation_codec=st.sampled_from(["fp32", "fp16", "bf16", "int8"]),
    batch__microbatches_per_round=st.integers(1, 200),
    batch__eval_every=st.integers(1, 5),
    keeping__checkpoint_every=st.integers(1, 5),
    averaging__overlap=st.booleans(),
)
MODELS = {num_stages: model(num_stages) for num_stages in (1, 2, 4)}
questions = {"spec": recipes, "kind": peers_of, "num_stages": st.sampled_from([1, 2, 4]), "ping_ms": st.floats(0, 200)}


@settings(max_examples=20)
@given(**questions, factor=st.floats(1.0, 100.0))
def test_better_peers_are_never_slower(spec, kind, num_stages, ping_ms, factor) -> None:  # type: ignore[no-untyped-def]
    """Faster links, a faster card, a shorter way: each by itself, in a swarm of peers that are alike."""
    kind = replace(kind, count=kind.count * num_stages)
    everybody = Swarm(peers=(kind,), ping_ms=ping_ms)
    before = forecast(everybody, MODELS[num_stages], spec)
    for better in (
        replace(kind, upload_mbps=kind.upload_mbps * factor),
        replace(kind, download_mbps=kind.download_mbps * factor),
        replace(kind, tflops=kind.tflops * factor),
    ):
        found = forecast(replace(everybody, peers=(better,)), MODELS[num_stages], spec)
        assert found.tokens_per_s >= before.tokens_per_s * (1 - 1e-9)
    nearer = forecast(replace(everybody, ping_ms=ping_ms / factor), MODELS[num_stages], spec)
    assert nearer.tokens_per_s >= before.tokens_per_s * (1 - 1e-9)


@settings(max_examples=20)
@given(**questions)
def test_shares_are_shares_and_bytes_add_up(spec, kind, num_stages, ping_ms) -> None:  # type: ignore[no-untyped-def]
    kind = replace(kind, count=kind.count * num_stages)
    found = forecast(Swarm(peers=(kind, replace(kind, count=2)), ping_ms=ping_ms), MODELS[num_stages], spec)
    for peers in found.peers:
        for share in (peers.computing, peers.sending, peers.receiving):
            assert 0 <= share <= 1 + 1e-9
        assert peers.computing <= found.computing + 1e-9
    sent = sum(peers.peers.count * peers.traffic.up for peers in found.peers)
    received = sum(peers.peers.count * peers.traffic.down for peers in found.peers)
    assert sent / found.tokens_per_round == pytest.approx(found.bytes_per_token)
    assert received / found.tokens_per_round == pytest.approx(
        found.activation_bytes_per_token + found.averaging_bytes_per_token, abs=1e-9
    )


def overlapping(spec: Recipe, overlap: bool) -> Recipe:
    return replace(spec, averaging=spec.averaging.model_copy(update={"overlap": overlap}))


@settings(max_examples=20)
@given(**questions)
def test_hiding_an_average_never_costs_time(spec, kind, num_stages, ping_ms) -> None:  # type: ignore[no-untyped-def]
    everybody = Swarm(peers=(replace(kind, count=kind.count * num_stages),), ping_ms=ping_ms)
    waiting, hidden = (forecast(everybody, MODELS[num_stages], overlapping(spec, overlap)) for overlap in (False, True))
    assert hidden.round_s <= waiting.round_s * (1 + 1e-9)
