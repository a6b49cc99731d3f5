"""Who hides its work. Oracle: by hand."""

from __future__ import annotations

from coordinator.audit.evasion import PATIENCE_S, Evasion
from protocol.ids import PeerId

A, B, C = map(PeerId, "abc")


def test_who_hides_most_of_its_work_while_others_do_not_is_found_and_in_the_end_proven() -> None:
    evasion = Evasion(least=10)
    seen = {A: (20, 11), B: (20, 0), C: (20, 2)}
    assert evasion.look(seen, now_s=0.0) == {A: False}
    assert evasion.look(seen, now_s=PATIENCE_S - 1.0) == {A: False}
    assert evasion.look(seen, now_s=PATIENCE_S) == {A: True}
    evasion.forget(A)
    assert evasion.look(seen, now_s=PATIENCE_S) == {A: False}


def test_what_happens_to_everybody_is_nobodys_doing() -> None:
    evasion = Evasion(least=10)
    assert evasion.look({A: (20, 18), B: (20, 12), C: (20, 15)}, now_s=0.0) == {}
    assert evasion.look({A: (20, 18)}, now_s=0.0) == {}, "nobody to compare it with"


def test_little_is_known_of_a_newcomer() -> None:
    evasion = Evasion(least=10)
    assert evasion.look({A: (9, 9), B: (20, 0)}, now_s=0.0) == {}


def test_who_shows_its_work_again_starts_anew() -> None:
    """Oracle: the patience counts from the second time on; a moment of which nothing is known does not count."""
    evasion, bad, good = Evasion(least=10), {A: (20, 20), B: (20, 0)}, {A: (20, 0), B: (20, 0)}
    assert evasion.look(bad, now_s=0.0) == {A: False}
    assert evasion.look(good, now_s=10.0) == {}
    assert evasion.look(bad, now_s=PATIENCE_S) == {A: False}
    assert evasion.look({A: (3, 3), B: (20, 0)}, now_s=PATIENCE_S + 10.0) == {}
    assert evasion.look(bad, now_s=2 * PATIENCE_S) == {A: True}
    assert evasion.look(bad, now_s=4 * PATIENCE_S) == {A: False}, "it was not seen for long"
