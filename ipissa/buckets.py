"""α buckets: engines that prepare something per α round it, so that what they keep is bounded."""

from __future__ import annotations


def to_bucket(alpha: float, bucket: float) -> float:
    """α rounded to a multiple of `bucket`, or α itself where `bucket` is 0; never -0."""
    if bucket == 0:
        return alpha + 0.0
    # Rounding the product again turns 0.7000000000000001 into the 0.7 that was asked for.
    return round(round(alpha / bucket) * bucket, 9) + 0.0
