"""How far apart two honest machines may be.

Owns: the table. Must not know: how distances are measured (`protocol/sketch.py`).

Calibrated by `python -m tests.benchmarks.trust --calibrate` on honest pairs of mixed dtypes and kernels, and frozen:
three times the largest distance that was seen there, for the activations and for the gradients of every codec.
"""

from __future__ import annotations

from coordinator.audit.court import Tolerance

_LARGEST = {"fp32": 0.010, "bf16": 0.011, "fp16": 0.010, "int8": 0.016, "int4": 0.10, "int4-turned": 0.09}
FACTOR = 3.0


def tolerance_of(codec: str, gradient_codec: str) -> Tolerance:
    """Return the tolerance of a run whose bodies travel in these codecs."""
    return Tolerance(outputs=FACTOR * _LARGEST[codec], returned=FACTOR * _LARGEST[gradient_codec])
