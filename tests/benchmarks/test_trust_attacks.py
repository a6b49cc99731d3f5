"""The attack table, small: one cheat, a few rounds.

Oracle: who cheats is known here.
"""

from __future__ import annotations

import pytest

from tests.benchmarks.trust_attacks import ATTACKS, CHEAT, figures_of, quietly, setting_of
from tests.benchmarks.trust_attacks import Trial as Attacked
from tests.benchmarks.trust_cheats import SignFlip
from tests.benchmarks.trust_world import Setting, train


@pytest.mark.timeout(120)
def test_who_turns_signs_is_put_out_and_nobody_else() -> None:
    with quietly():
        result = train(Setting(rounds=3, cheats={(1, CHEAT): SignFlip}))
    (cheat,) = result.cheats
    assert result.out == {cheat.peer}
    assert result.honest_struck() == 0
    assert cheat.tasks_when_out is not None
    assert 0 < sum(cheat.bad.values()) == cheat.tasks_when_out <= 4
    assert result.fake_share() == 0.0
    assert result.findings["confirmed", False] > 0
    assert not {finding for finding, honest in result.findings if honest} - {"valid", "nothing"}
    told = figures_of(Attacked((result,), (result,)))
    assert (told["caught"], told["tasks_until_caught_median"]) == (1, cheat.tasks_when_out)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_has_somebody_to_cheat(name: str) -> None:
    assert setting_of(name, 0, quick=True).cheats
