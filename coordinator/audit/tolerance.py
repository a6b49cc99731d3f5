"""How far apart two honest machines may be.

Owns: the table. Must not know: how distances are measured (`protocol/sketch.py`).

Calibrated by `python -m tests.benchmarks.trust --calibrate` and frozen: the largest distances among 5,184 audits of
honest pairs for each codec (twelve seeds, three stages, fp32 and bf16, two attention kernels each). Peers compute in
fp32 today, so that is more than they have. Gradients have a longer tail than activations, and a smaller factor: with
three times what was seen, 5 % of noise would pass, and as it is 3 % are on the edge.
"""

from __future__ import annotations

from coordinator.audit.court import Tolerance

_LARGEST = {
    "fp32": (0.0066, 0.0182),
    "fp16": (0.0066, 0.0166),
    "bf16": (0.0071, 0.0172),
    "int8": (0.0126, 0.0162),
    "int4": (0.0648, 0.0768),
    "int4-turned": (0.0602, 0.0706),
}
"""Of activations and of gradients that travel in a codec."""
OUTPUTS_FACTOR, RETURNED_FACTOR = 3.0, 1.8


def tolerance_of(codec: str, gradient_codec: str) -> Tolerance:
    """Return the tolerance of a run whose bodies travel in these codecs."""
    return Tolerance(
        outputs=OUTPUTS_FACTOR * _LARGEST[codec][0], returned=RETURNED_FACTOR * _LARGEST[gradient_codec][1]
    )
