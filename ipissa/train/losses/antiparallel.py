"""The successor's loss: shifts at +1 and -1 must point against each other along the trait (arXiv 2601.07473).

    d(c) = (chosen - rejected at c) - (chosen - rejected at reference), in units of the references' spread
    q    = cos(d₊, ref) · cos(d₋, ref) · f₊ f₋,   f = (‖d in the subspace‖ / ‖d‖)^0.75
    L    = 30 q + relu(30 q)²

No direction is fixed in advance and nothing can grow without bound: q is -1 at best.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

SCALE = 30.0
FOCUS = 0.75  # 1 - 0.25: how strongly shifts outside the subspace are discounted
EPS = 1e-8  # beside norms, so that a shift of 0 has a gradient
MIN_SPREAD = 0.05
SPREAD_FLOOR = 0.1  # times the median spread


def antiparallel_loss(positive: Tensor, negative: Tensor, reference: Tensor, basis: Tensor, spread: Tensor) -> Tensor:
    """L per pair, at least -30 and negative when the poles move apart along the reference.

    Args:
        positive, negative, reference: chosen - rejected states at +1, -1 and off, token means, (pairs, d).
        basis: Orthonormal columns of the subspace that counts, in units of the spread, (d, k).
        spread: Of all references (`reference_spread`), (d,).

    Returns:
        (pairs,).
    """
    ref = (reference / spread) @ basis
    shifts = [(state - reference) / spread for state in (positive, negative)]
    inside = [shift @ basis for shift in shifts]
    q = cosine_similarity(inside[0], ref, dim=-1) * cosine_similarity(inside[1], ref, dim=-1)
    for part, whole in zip(inside, shifts, strict=True):
        q = q * ((part.norm(dim=-1) + EPS) / (whole.norm(dim=-1) + EPS)) ** FOCUS
    return SCALE * q + torch.relu(SCALE * q) ** 2


def reference_spread(references: Tensor) -> Tensor:
    """Standard deviation of every dimension over all pairs (pairs, d), floored, (d,).

    The successor took that of a batch, which at a few pairs per batch is noise, and another at every step.
    """
    spread = references.std(0, correction=0)
    return spread.clamp(min=max(SPREAD_FLOOR * float(spread.median()), MIN_SPREAD))
