"""Sketches: a few numbers that tell how far two tensors are apart, if nobody knew the seed beforehand. Pure.

Owns: the count sketch (Charikar, Chen, Farach-Colton 2002) of flat values, and the distance of two of them. Must not
know: what is compared, or how far apart honest machines are (`coordinator/audit/tolerance.py`).

A sketch sees sign and scale, and it is linear: that of a sum is the sum of sketches. What it does not see lies in its
null space, and without the seed nobody finds that: so a seed is given out only once the values cannot change any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from protocol.errors import WireError
from protocol.ids import digest

WIDTH = 256  # numbers per piece: the distance is estimated to 7 % (one standard deviation)
MAX_PIECES = 8
SEGMENT = 1 << 14
TURNS, MANY_TURNS = 8, 512
"""In how many ways segments share one pattern; and of how many segments that is drawn at once."""
MAX_SKETCH_BYTES = MAX_PIECES * WIDTH * 4
QUIET = 0.1  # of the mean: a piece that has less than so much is measured by that, or rounding would be all of it

Values = npt.NDArray[np.float32]


def pattern(seed: bytes, length: int) -> tuple[npt.NDArray[np.int64], Values]:
    """Return for each of `length` values where it is added, below `WIDTH`, and with which sign."""
    raw = np.random.Philox(key=int.from_bytes(digest(seed)[:16], "big")).random_raw(length)
    return (raw % WIDTH).astype(np.int64), np.where(raw >> np.uint64(63), np.float32(1), np.float32(-1))


# many sketches of one seed are made at a time, one for each member of an average, and shard by shard
_kept_pattern = lru_cache(maxsize=1)(pattern)
_kept_turns = lru_cache(maxsize=1)(pattern)


def sketch(values: Values, seed: bytes, *, pieces: int = MAX_PIECES) -> bytes:
    """Sketch flat fp32 values, cut into up to `pieces` of equal length (the last may be shorter).

    Returns fp32, little-endian, `WIDTH` for each piece. The pieces localise: what spoils a few tokens is a small part
    of the whole, and a large one of its piece.
    """
    length = max(1, -(-len(values) // pieces))
    buckets, signs = pattern(seed, min(length, len(values)))
    rows = []
    for start in range(0, len(values), length):
        piece = values[start : start + length]
        rows.append(np.bincount(buckets[: len(piece)], piece * signs[: len(piece)], minlength=WIDTH))
    return np.asarray(rows, dtype="<f4").tobytes()


class ShardSketch:
    """The sketch of a stage's weights, or as many numbers, in `MAX_PIECES`: the shards go into them in turn.

    Segments of a shard share one pattern, each turned in one of `TURNS` ways and with a sign of its own. So those that
    are turned alike can be added up first, which is as fast as memory is, and only their sums are put into buckets.
    What is spoilt at one and the same place of many segments, the worst that can be done without the seed, still lands
    in as many buckets as there are ways. Up to 4 MiB of such sums are held.
    """

    def __init__(self, seed: bytes) -> None:
        self._seed, (self._buckets, self._signs) = seed, _kept_pattern(seed, SEGMENT)
        self._alike: dict[tuple[int, int], Values] = {}
        """Sums of segments, by piece and turn."""

    def add(self, shard: int, values: Values, *, start: int = 0) -> None:
        """Add numbers of a shard from `start` on, at the beginning of a segment."""
        first, rest = divmod(start, SEGMENT)
        assert rest == 0, "a segment is sketched from its beginning"
        count = -(-len(values) // SEGMENT)
        enough = -(-(first + count) // MANY_TURNS) * MANY_TURNS
        turns, flips = _kept_turns(self._seed + shard.to_bytes(4, "big"), enough)
        for index in range(count):
            segment = values[index * SEGMENT : (index + 1) * SEGMENT]
            key = shard % MAX_PIECES, int(turns[first + index]) % TURNS
            if key not in self._alike:
                self._alike[key] = np.zeros(SEGMENT, dtype=np.float32)
            total = self._alike[key][: len(segment)]
            (np.add if flips[first + index] > 0 else np.subtract)(total, segment, out=total)

    def packed(self) -> bytes:
        """Return the sketch."""
        sums = np.zeros((MAX_PIECES, WIDTH))
        for (piece, turn), total in sorted(self._alike.items()):
            row = np.bincount(self._buckets, total * self._signs, minlength=WIDTH)
            sums[piece] += np.roll(row, turn * (WIDTH // TURNS))
        return bytes(sums.astype("<f4").tobytes())


def sketch_shards(shards: Iterable[Values], seed: bytes) -> bytes:
    """Sketch all shards of something, flat fp32 each."""
    whole = ShardSketch(seed)
    for number, values in enumerate(shards):
        whole.add(number, values)
    return whole.packed()


def folded(packed: bytes) -> bytes:
    """Return a sketch of the same values in one piece: less is seen of what spoils only some of them."""
    return bytes(_rows(packed).sum(axis=0).astype("<f4").tobytes())


def summed(sketches: Iterable[bytes]) -> bytes:
    """Add sketches up: that is the sketch of the sum. Raises `WireError` if they do not fit each other."""
    rows = [_rows(each) for each in sketches]
    if len({each.shape for each in rows}) != 1:
        raise WireError("sketches of different lengths")
    return bytes(np.sum(rows, axis=0).astype("<f4").tobytes())


def scaled(packed: bytes, factor: float) -> bytes:
    """Return the sketch of the same values times a factor."""
    return bytes((factor * _rows(packed)).astype("<f4").tobytes())


def distance(ours: bytes, theirs: bytes) -> float:
    """Estimate the largest relative L2 distance of a piece of two tensors: 0 for equal ones, 2 for opposite signs.

    Not finite values are infinitely far from anything. Raises `WireError` if the sketches do not fit each other.
    """
    mine, other = _alike(ours, theirs)
    if not (np.isfinite(mine).all() and np.isfinite(other).all()):
        return math.inf
    norms = np.linalg.norm(mine, axis=1)
    scale = np.maximum(norms, QUIET * float(np.sqrt(np.mean(norms**2))))
    apart = np.linalg.norm(mine - other, axis=1)
    return float(np.max(np.divide(apart, scale, out=np.where(apart > 0, np.inf, 0.0), where=scale > 0)))


def whole_distance(ours: bytes, theirs: bytes) -> float:
    """Estimate the relative L2 distance of two tensors as a whole. Else as `distance`."""
    mine, other = _alike(ours, theirs)
    if not (np.isfinite(mine).all() and np.isfinite(other).all()):
        return math.inf
    size, apart = float(np.linalg.norm(mine)), float(np.linalg.norm(mine - other))
    return apart / size if size > 0 else math.inf if apart > 0 else 0.0


def is_sketch(packed: bytes) -> bool:
    """Tell whether bytes are a sketch, and of numbers."""
    try:
        return bool(np.isfinite(_rows(packed)).all())
    except WireError:
        return False


def directions(sketches: Sequence[bytes]) -> list[float]:
    """Estimate the cosine of each of some tensors and the sum of all others, every one with a norm of 1.

    Honest contributions to one average point the same way, more or less. -1 for what is 0. Raises `WireError` if the
    sketches do not fit each other.
    """
    if len({len(each) for each in sketches}) != 1:
        raise WireError("sketches of different lengths")
    rows = np.stack([_rows(each).ravel() for each in sketches])
    if not np.isfinite(rows).all():
        raise WireError("a sketch with numbers that are none")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    others = units.sum(axis=0) - units
    lengths = np.linalg.norm(others, axis=1)
    along = np.einsum("ij,ij->i", units, others)
    found = np.divide(along, lengths, out=np.zeros_like(along), where=lengths > 0)
    return [float(each) for each in np.where(norms[:, 0] > 0, found, -1.0)]


def _alike(ours: bytes, theirs: bytes) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    mine, other = _rows(ours), _rows(theirs)
    if mine.shape != other.shape:
        raise WireError(f"a sketch of {len(other)} pieces where {len(mine)} were expected")
    return mine, other


def _rows(packed: bytes) -> npt.NDArray[np.float64]:
    if not packed or len(packed) % (4 * WIDTH) or len(packed) > MAX_SKETCH_BYTES:
        raise WireError(f"a sketch of {len(packed)} bytes")
    return np.frombuffer(packed, dtype="<f4").reshape(-1, WIDTH).astype(np.float64)
