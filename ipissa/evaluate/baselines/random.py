"""An adapter that turns as far as a trained one, in directions that mean nothing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ipissa.adapter.checkpoint import Adapter


def random_like(adapter: Adapter, *, seed: int) -> Adapter:
    """An adapter of the same form whose rotations and scales are random, with the norms of the trained ones."""
    generator = torch.Generator().manual_seed(seed)

    def skew_like(a: Tensor) -> Tensor:
        x = torch.randn(a.shape, generator=generator)
        return (x - x.T) * (a.norm() / (x - x.T).norm())

    def vector_like(d: Tensor) -> Tensor:
        x = torch.randn(d.shape, generator=generator)
        return x * (d.norm() / x.norm())

    modules = {
        name: replace(
            factors,
            rotation_v=skew_like(factors.rotation_v),
            rotation_u=None if factors.rotation_u is None else skew_like(factors.rotation_u),
            delta_s=None if factors.delta_s is None else vector_like(factors.delta_s),
        )
        for name, factors in adapter.modules.items()
    }
    return replace(adapter, modules=modules, digest=None)
