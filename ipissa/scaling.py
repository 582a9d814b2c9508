"""How singular values follow α.

    add2      S(α) = S + α d
    add_tanh  S(α) = S + α tanh(d) S
    mult      S(α) = S exp(α d)
    none      S(α) = S

All return S exactly at α = 0, so the adapter vanishes there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SCALE_MODES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "add2": lambda s, d, alpha: s + alpha * d,
    "add_tanh": lambda s, d, alpha: s + alpha * torch.tanh(d) * s,
    "mult": lambda s, d, alpha: s * torch.exp(alpha * d),
    "none": lambda s, d, alpha: s + 0 * alpha,
}

# Modes in which S(α) - S is α times a fixed vector: the runtime folds that vector into its factors.
LINEAR_STEPS: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "add2": lambda s, d: d,
    "add_tanh": lambda s, d: torch.tanh(d) * s,
    "none": lambda s, d: None,
}


def scaled_singular_values(s: Tensor, d: Tensor | None, alpha: Tensor, *, mode: str) -> Tensor:
    """S(α) for every α; s and d (r,), alpha (n,) -> (n, r). `d` is None in mode `none`."""
    return SCALE_MODES[mode](s, torch.zeros_like(s) if d is None else d, alpha[:, None])
