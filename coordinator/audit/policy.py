"""How closely a peer is looked at, and what follows from what was seen. Pure.

Owns: standings, the rate of audits, and sanctions. Must not know: how an audit goes (`court.py`), the database.

Rates follow BOINC's adaptive replication: everything at first, then less with every audit that found nothing, down to
one in fifty. A cheater does not know which of its tasks are drawn, so before it is caught it gets away with one over
the rate of them, however rarely it cheats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from protocol.ids import PeerId

TRUSTED_AFTER = 20  # audits in a row that found nothing
LEAST_RATE = 0.02
TRUST = 10.0  # rate times audits that found nothing
DOUBT_S = 3600.0
"""How long somebody is looked at closely after an audit that found something and was not settled."""
STRIKES_COUNT_S = 30 * 86400.0
HOURS = (1.0, 24.0, 7 * 24.0, 30 * 24.0)
"""Out for so long with the first strike, the second, and so on."""
BANNED_FROM = 3  # strikes
MAX_VOUCHERS = 8
PROVEN = 100  # audits that found nothing: who then does wrong once is probably broken, and not a liar


class State(StrEnum):
    """Where a peer stands."""

    NEW = "new"
    PROBATION = "probation"
    """All of its work is looked at."""
    TRUSTED = "trusted"
    SUSPECT = "suspect"
    """Something was found that is not settled; all of its work is looked at."""
    QUARANTINED = "quarantined"
    HARDWARE_FAULT = "hardware_fault"
    BANNED = "banned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What audits know of one peer."""

    peer: PeerId
    valid: int = 0
    """Audits in a row that found nothing."""
    audited: int = 0
    strikes: tuple[float, ...] = ()
    """When it was found to do wrong, by two witnesses. Unix seconds."""
    faults: tuple[float, ...] = ()
    """When that was taken for broken hardware."""
    doubted_s: float = float("-inf")
    accusers: frozenset[PeerId] = frozenset()
    """Single witnesses, lately, that were not settled."""
    out_since_s: float = float("-inf")
    out_until_s: float = float("-inf")
    out_as: State = State.QUARANTINED
    """What it is until then."""
    vouched_s: Mapping[PeerId, float] = field(default_factory=dict)
    """Until when each of its latest auditors has found nothing."""
    vouched_sum_s: Mapping[PeerId, float] = field(default_factory=dict)
    """The same of its contributions to averages."""


_FIELDS = frozenset(each.name for each in fields(Standing))


@dataclass(frozen=True, slots=True)
class Sanction:
    """What is done about a strike."""

    state: State
    hours: float
    reason: str
    gone_since_s: float = 0.0
    """What was earned since then and is still held is taken back; all of it from a liar."""


def state_of(standing: Standing, *, now_s: float) -> State:
    """Return where a peer stands."""
    if standing.out_until_s > now_s:
        return standing.out_as
    if now_s - standing.doubted_s < DOUBT_S:
        return State.SUSPECT
    if standing.audited == 0:
        return State.NEW
    return State.TRUSTED if standing.valid >= TRUSTED_AFTER else State.PROBATION


def rate(standing: Standing, *, now_s: float) -> float:
    """Return with which probability one of its microbatches is looked at."""
    if state_of(standing, now_s=now_s) is not State.TRUSTED:
        return 1.0
    return max(LEAST_RATE, TRUST / standing.valid) if standing.valid > TRUST else 1.0


def passed(standing: Standing, auditor: PeerId, *, now_s: float, is_sum: bool = False) -> Standing:
    """An audit has found nothing, of a microbatch or of a contribution that was given before `now_s`.

    Its auditor vouches for what was done until then only once there were enough in a row: one of many microbatches that
    is right says little of the others, and of a newcomer's not all can be looked at.
    """
    found = replace(standing, valid=standing.valid + 1, audited=standing.audited + 1)
    if found.valid < TRUSTED_AFTER:
        return found
    known = {**(standing.vouched_sum_s if is_sum else standing.vouched_s)}
    known[auditor] = max(now_s, known.get(auditor, now_s))
    latest = dict(sorted(known.items(), key=lambda pair: -pair[1])[:MAX_VOUCHERS])
    return replace(found, vouched_sum_s=latest) if is_sum else replace(found, vouched_s=latest)


def kept_until(standing: Standing, *, is_sum: bool = False, own: Collection[PeerId] = ()) -> float:
    """Return until when its credits stay if it turns out to be broken now.

    For that two auditors have to vouch, as one may lie; or one of the organiser's `own`.
    """
    vouched_s = standing.vouched_sum_s if is_sum else standing.vouched_s
    sure_s = [at_s for peer, at_s in vouched_s.items() if peer in own]
    return max([*sorted(vouched_s.values())[-2:-1], *sure_s], default=float("-inf"))


def doubted(standing: Standing, accuser: PeerId, *, now_s: float) -> tuple[Standing, Sanction | None]:
    """One witness speaks against it. A second one, another, makes it a strike."""
    fresh = standing.accusers if now_s - standing.doubted_s < DOUBT_S else frozenset[PeerId]()
    accusers = fresh | {accuser}
    if len(accusers) > 1:
        return struck(standing, now_s=now_s)
    return replace(standing, valid=0, audited=standing.audited + 1, doubted_s=now_s, accusers=accusers), None


def suspected(standing: Standing, *, now_s: float) -> Standing:
    """It or another one lies, and nobody knows which: both are looked at closely."""
    return replace(standing, valid=0, doubted_s=now_s)


def struck(
    standing: Standing,
    *,
    now_s: float,
    why: str = "two others recomputed its work and found it wrong",
    is_broken: bool = True,
    is_sum: bool = False,
    own: Collection[PeerId] = (),
) -> tuple[Standing, Sanction]:
    """Two witnesses agree that it did wrong, which may be because it `is_broken`.

    Once, after a long time of doing right, is what a card does that is too hot: it gets an hour to cool down, and loses
    nothing but what it did wrong. Whoever does it again is taken for a liar.
    """
    fresh = replace(standing, valid=0, audited=standing.audited + 1, accusers=frozenset(), doubted_s=now_s)
    if is_broken and standing.valid >= PROVEN and not standing.strikes and not _recent(standing.faults, now_s):
        sanction = Sanction(
            State.HARDWARE_FAULT,
            HOURS[0],
            "its results were wrong once, after many that were right; check its temperature, memory and overclocking "
            "(peer bench burn-in)",
            max(0.0, kept_until(standing, is_sum=is_sum, own=own)),
        )
        fresh = replace(fresh, faults=(*standing.faults, now_s))
    else:
        strikes = (*standing.strikes, now_s)
        count = len(_recent(strikes, now_s))
        hours = HOURS[min(count, len(HOURS)) - 1]
        state = State.BANNED if count >= BANNED_FROM else State.QUARANTINED
        sanction = Sanction(state, hours, f"{why} ({count}. time)")
        fresh = replace(fresh, strikes=strikes)
    until_s = now_s + sanction.hours * 3600
    return replace(fresh, out_since_s=now_s, out_until_s=until_s, out_as=sanction.state), sanction


def inherited(standing: Standing, earlier: Standing) -> Standing:
    """What is known of a key that was replaced is known of its successor. Of two, what says less for it counts."""
    own = standing if standing.audited else replace(standing, valid=earlier.valid)
    return replace(
        own,
        valid=min(own.valid, earlier.valid),
        audited=own.audited + earlier.audited,
        strikes=tuple(sorted({*own.strikes, *earlier.strikes})),
        faults=tuple(sorted({*own.faults, *earlier.faults})),
        doubted_s=max(own.doubted_s, earlier.doubted_s),
        accusers=own.accusers | earlier.accusers,
        out_since_s=max(own.out_since_s, earlier.out_since_s),
        out_until_s=max(own.out_until_s, earlier.out_until_s),
        out_as=max(own, earlier, key=lambda each: each.out_until_s).out_as,
        vouched_s=_earlier(own.vouched_s, earlier.vouched_s) if standing.audited else earlier.vouched_s,
        vouched_sum_s=_earlier(own.vouched_sum_s, earlier.vouched_sum_s) if standing.audited else earlier.vouched_sum_s,
    )


def is_witness(standing: Standing, key: PeerId) -> bool:
    """Tell whether a key has spoken for or against a peer lately."""
    return key in standing.accusers or key in standing.vouched_s or key in standing.vouched_sum_s


def renamed(standing: Standing, before: PeerId, after: PeerId) -> Standing:
    """A witness goes by another key now: it stays one witness."""

    def as_after(key: PeerId) -> PeerId:
        return after if key == before else key

    return replace(
        standing,
        accusers=frozenset(map(as_after, standing.accusers)),
        vouched_s={as_after(key): at_s for key, at_s in standing.vouched_s.items()},
        vouched_sum_s={as_after(key): at_s for key, at_s in standing.vouched_sum_s.items()},
    )


def pardoned(standing: Standing) -> Standing:
    """An appeal was granted: the last strike or fault is taken back, and it starts on probation."""
    return replace(
        standing,
        strikes=standing.strikes[:-1],
        faults=standing.faults[:-1] if not standing.strikes else standing.faults,
        valid=0,
        doubted_s=float("-inf"),
        out_until_s=float("-inf"),
    )


def fields_of(standing: Standing) -> dict[str, Any]:
    """Return a standing as it is kept."""
    return {key: sorted(value) if isinstance(value, frozenset) else value for key, value in asdict(standing).items()}


def standing_from(peer: PeerId, kept: Mapping[str, Any]) -> Standing:
    """Return a standing that was kept."""
    known = {name: value for name, value in kept.items() if name in _FIELDS} | {"peer": peer}
    for name, kind in (("strikes", tuple), ("faults", tuple), ("accusers", frozenset), ("out_as", State)):
        known[name] = kind(known[name])
    return Standing(**known)


def _earlier(one: Mapping[PeerId, float], other: Mapping[PeerId, float]) -> dict[PeerId, float]:
    """Return who vouches for both, until the earlier moment."""
    return {key: min(at_s, other[key]) for key, at_s in one.items() if key in other}


def _recent(times_s: tuple[float, ...], now_s: float) -> list[float]:
    return [at_s for at_s in times_s if now_s - at_s < STRIKES_COUNT_S]
