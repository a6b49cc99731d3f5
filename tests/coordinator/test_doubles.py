"""Who counts as two at once. Pure.

Oracle: scripts of when processes live. Lives that do not overlap are one peer that was restarted, whatever was still
under way when one ended; lives that overlap for long are a cloned key.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.doubles import MAX_PROCESSES, Doubles
from protocol.ids import PeerId

ME, OTHER = PeerId("me"), PeerId("other")
BEAT_S = 2.0
LATE_S = 20.0  # a call's deadline twice over


def beats(process: int, start_s: float, end_s: float, every_s: float = BEAT_S) -> list[tuple[float, int]]:
    """Return what a process says while it lives."""
    return [(start_s + every_s * number, process) for number in range(int((end_s - start_s) / every_s) + 1)]


def noticed_s(*said: list[tuple[float, int]]) -> float | None:
    """Return when two at once are noticed in all that was said."""
    doubles = Doubles()
    for at_s, process in sorted(word for words in said for word in words):
        if doubles.hear(ME, process, now_s=at_s):
            return at_s
    return None


def test_two_at_once_are_noticed_within_a_minute() -> None:
    found_s = noticed_s(beats(1, 0.0, 300.0), beats(2, 101.0, 300.0))
    assert found_s is not None
    assert 101.0 < found_s < 161.0


@given(
    first_s=st.floats(0.3, 15.0), second_s=st.floats(0.3, 15.0), offset_s=st.floats(0.01, 30.0), restarts=st.booleans()
)
def test_two_at_once_are_noticed_within_two_minutes_at_any_pace(
    first_s: float, second_s: float, offset_s: float, restarts: bool
) -> None:
    """Also if one of them speaks as seldom as a bad line lets it, or a third one comes."""
    third = beats(3, 40.0 + offset_s, 300.0) if restarts else []
    found_s = noticed_s(beats(1, 0.0, 300.0, first_s), beats(2, offset_s, 300.0, second_s), third)
    assert found_s is not None
    assert found_s - offset_s < 120.0


@given(
    lives=st.lists(st.tuples(st.floats(0.0, 200.0), st.floats(0.0, 400.0)), min_size=2, max_size=12),
    late_s=st.lists(st.floats(0.0, LATE_S), max_size=4),
)
def test_a_peer_that_is_restarted_is_never_two(lives: list[tuple[float, float]], late_s: list[float]) -> None:
    """Here or on another machine, at once or later; and what was under way arrives after its successor's first word."""
    said, now_s = [], 0.0
    for process, (age_s, pause_s) in enumerate(lives):
        said.append(beats(process, now_s, now_s + age_s))
        now_s += age_s + max(pause_s, 3.0)  # to start takes that long
    end_s = said[0][-1][0]
    said.append([(end_s + late, 0) for late in late_s])
    assert noticed_s(*said) is None


def test_one_that_slept_and_wakes_when_the_other_has_ended_is_not_two() -> None:
    """A laptop is closed, the key is used elsewhere, that ends, the laptop is opened."""
    assert noticed_s(beats(1, 0.0, 100.0), beats(2, 110.0, 600.0), beats(1, 610.0, 900.0)) is None


def test_a_copy_that_was_started_by_mistake_and_stopped_is_not_noticed() -> None:
    assert noticed_s(beats(1, 0.0, 300.0), beats(2, 101.0, 121.0)) is None


def test_a_copy_that_draws_a_new_number_for_every_word_is_noticed() -> None:
    thief = [(100.0 + 0.5 * number, 1000 + number) for number in range(400)]
    found_s = noticed_s(beats(1, 0.0, 300.0), thief)
    assert found_s is not None
    assert found_s < 161.0
    assert noticed_s(thief[: MAX_PROCESSES + 10]) is not None, "and so is one without the other"


def test_peers_are_told_apart_and_forgotten() -> None:
    doubles = Doubles()
    for second in range(40):
        assert not doubles.hear(ME, 1, now_s=second)
        assert not doubles.hear(OTHER, 2, now_s=second)
    assert any(doubles.hear(ME, 1 + second % 2, now_s=second) for second in range(40, 80))
    doubles.forget(ME)
    assert not any(doubles.hear(ME, 1 + second % 2, now_s=second) for second in range(80, 105))
