"""The adapter's effect on one linear layer, straight from its definition.

    y(α) = base(x) + x V [ R_v(α) diag(S(α)) R_u(α)ᵀ - diag(S) ] Uᵀ

The bracket is the core: an (r, r) matrix per α, exactly zero at α = 0. Training differentiates
through it and LoRA export multiplies it out; serving uses the equal but cheaper phase form
(`ipissa.phases`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipissa.rotation import ROTATIONS
from ipissa.scaling import scaled_singular_values


def delta_core(
    s: Tensor,
    rotation_v: Tensor | None,
    rotation_u: Tensor | None,
    delta_s: Tensor | None,
    alpha: Tensor,
    *,
    rotation: str,
    scale_mode: str,
) -> Tensor:
    """R_v(α) diag(S(α)) R_u(α)ᵀ - diag(S); s (r,), skew matrices (r, r), alpha (n,) -> (n, r, r)."""
    core = torch.diag_embed(scaled_singular_values(s, delta_s, alpha, mode=scale_mode))
    if rotation_v is not None:
        core = ROTATIONS[rotation](rotation_v, alpha) @ core
    if rotation_u is not None:
        core = core @ ROTATIONS[rotation](rotation_u, alpha).mT
    return core - torch.diag(s)
