"""α buckets: engines that prepare something per α round it, so that what they keep is bounded."""

from __future__ import annotations

import math

MAX_ALPHA = 1e6  # nothing finite is left of a model there


def to_bucket(alpha: float, bucket: float, *, limit: float = math.inf) -> float:
    """α rounded to a multiple of `bucket` that is at most `limit`, or α itself where `bucket` is 0; never -0."""
    if bucket == 0:
        return alpha + 0.0
    # Rounding the product again turns 0.7000000000000001 into the 0.7 that was asked for.
    multiple = round(round(alpha / bucket) * bucket, 9) + 0.0
    if abs(multiple) <= limit or abs(alpha) > limit:
        return multiple
    # The limit lies between two multiples, and α nearer to the one beyond it.
    return round(multiple - math.copysign(bucket, multiple), 9) + 0.0
