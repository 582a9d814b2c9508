"""An adapter that turns as far as a trained one, in directions that mean nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ipissa.adapter.base_model import find_linear
from ipissa.adapter.checkpoint import Adapter, ModuleFactors
from ipissa.adapter.frame import frame_factors
from ipissa.adapter.layer import dense_weight


def random_like(adapter: Adapter, model: Any, *, seed: int) -> Adapter:
    """An adapter of the same form whose rotations and scales are random, with the norms of the trained ones.

    Singular triples stay what they are. Learnt directions are drawn anew, from all of `model`'s input directions.
    """
    generator = torch.Generator().manual_seed(seed)
    learnt = adapter.config.directions == "learnt"

    def skew_like(a: Tensor) -> Tensor:
        x = torch.randn(a.shape, generator=generator)
        return (x - x.T) * (a.norm() / (x - x.T).norm())

    def vector_like(d: Tensor) -> Tensor:
        x = torch.randn(d.shape, generator=generator)
        return x * (d.norm() / x.norm())

    def elsewhere(name: str, factors: ModuleFactors) -> ModuleFactors:
        weight = dense_weight(find_linear(model, name, adapter)).cpu()
        u, s, v, _ = frame_factors(weight, torch.randn(factors.V.shape, generator=generator))
        return replace(factors, U=u.float(), S=s.float(), V=v.float())

    modules = {
        name: replace(
            elsewhere(name, factors) if learnt else factors,
            rotation_v=skew_like(factors.rotation_v),
            rotation_u=None if factors.rotation_u is None else skew_like(factors.rotation_u),
            delta_s=None if factors.delta_s is None else vector_like(factors.delta_s),
        )
        for name, factors in adapter.modules.items()
    }
    return replace(adapter, modules=modules, digest=None)
