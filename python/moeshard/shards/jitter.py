"""A shard whose numbers are changed a little: what rounding may do to what it computes."""

from __future__ import annotations

import numpy as np

from moeshard._core import MoeshardError, SegmentList

# Relative. An eighth of the step of the half-precision numbers that a KV cache, the table of GELU and many weights are
# made of, and much more than the float32 rounding by which a sound shard begins to differ from the masked model
# (2^-24, a few times). So what is rounded to less on the way (half precision, blocks of 8 bits) tips over here at
# least as often as there.
JITTER = 2.0**-14


def jittered(segments: SegmentList) -> SegmentList:
    """Return the same file with each weight of each norm multiplied by a random number next to 1."""
    rng = np.random.default_rng(2)
    replaced = []
    for info in segments.tensor_infos:
        if info.type == "f32" and "norm" in info.name:
            weights = np.frombuffer(segments.read(info.offset, info.nbytes), dtype="<f4")
            factors = 1 + rng.uniform(-JITTER, JITTER, weights.size)
            replaced.append((info.offset, (weights * factors).astype("<f4").tobytes()))
    if not replaced:
        raise MoeshardError("has no norms in single precision, by which it could be measured what rounding does")
    return segments.with_bytes(replaced)
