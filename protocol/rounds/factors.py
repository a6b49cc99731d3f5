"""By what each contribution to an average is multiplied before it is added. Pure.

Owns: weights (0017) and norm clipping (0021) as one factor per member. It follows from the list of contributions alone,
which is in every commit: whoever makes a sum, reads it later or checks it finds the same numbers. Must not know:
tensors, who measured a norm and who checks it (`peer/averaging/`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from protocol.rounds.messages import Contribution

CLIP = 2.0
"""Times the usual norm: more of it nobody adds. Honest members' norms differ by a tenth or two."""
LEAST_CLIPPED = 3
"""Of two members nobody can say which one is unusual."""


def factors_of(contributions: Sequence[Contribution], *, is_mean: bool) -> tuple[float, ...]:
    """Return by what contributions are multiplied; nothing if all are by 1.

    In a mean those are shares, at most. A sum that stands for `tokens` is made smaller by as much as they do not count:
    who claims too many makes its own sum smaller, and who claims none has nothing to add. What is clipped is missing
    from the sum, and nobody else counts for more because of that.
    """
    clips = clips_of(contributions, is_mean=is_mean)
    if is_mean:
        shares = shares_of([each.weight for each in contributions])
        return tuple(share * clip for share, clip in zip(shares, clips, strict=True))
    if all(0 < each.weight == each.tokens for each in contributions) and all(clip == 1.0 for clip in clips):
        return ()
    return tuple(
        each.weight / each.tokens * clip if each.tokens else 0.0
        for each, clip in zip(contributions, clips, strict=True)
    )


def clips_of(contributions: Sequence[Contribution], *, is_mean: bool) -> tuple[float, ...]:
    """Return the factor that brings each contribution's norm to `CLIP` times the usual one; 1 if it is below.

    A drift (in a mean) is as long as its steps make it. The gradient of a sum grows with the tokens that it is of, but
    noise only with their square root, and most of a gradient is noise: who has fewer tokens than most may have as much
    more of it per token, or slow cards would be clipped for being slow.
    """
    counted = [each for each in contributions if each.weight]
    if len(counted) < LEAST_CLIPPED:
        return (1.0,) * len(contributions)
    usual_tokens = statistics.median(each.tokens for each in counted)

    def size(each: Contribution) -> float:
        return each.norm if is_mean else each.norm / max(each.tokens, math.sqrt(each.tokens * usual_tokens))

    sizes = [size(each) if each.weight else 0.0 for each in contributions]
    limit = CLIP * statistics.median(found for found, each in zip(sizes, contributions, strict=True) if each.weight)
    return tuple(limit / found if found > limit > 0 else 1.0 for found in sizes)


def shares_of(weights: Sequence[int]) -> tuple[float, ...]:
    """Return each weight's part of all of them; nothing of nothing."""
    total = sum(weights)
    return tuple(weight / total if total else 0.0 for weight in weights)
