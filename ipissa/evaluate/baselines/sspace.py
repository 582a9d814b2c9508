"""Steering in the singular basis without training: y += α ((x V√S) ∘ δ) (U√S)ᵀ per module.

δ is the unit mean difference of the module's outputs on contrastive pairs in the basis U√S. Because
√S δ √S = diag(S δ), it is an adapter that turns nothing and moves its singular values by α S δ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ipissa.adapter.checkpoint import Adapter, ModuleFactors
from ipissa.adapter.layer import thin_svd
from ipissa.data.activations import PairActivations


def sspace_like(model: Any, found: PairActivations, adapter: Adapter) -> Adapter:
    """The untrained relative of an adapter, on the same modules; their inputs must have been read.

    It has as many leading triples as an adapter of triples, and all of them beside learnt directions, which are
    mixed of all.
    """
    rank = None if adapter.config.directions == "learnt" else adapter.config.rank
    modules = {}
    for name in adapter.modules:
        svd = thin_svd(model.get_submodule(name))
        u, s, v = (part[..., :rank].cpu().contiguous() for part in svd)
        # y U√S = x Wᵀ U√S = x V S √S
        chosen, rejected = (side @ (v * s**1.5) for side in found.inputs[name])
        delta = nn.functional.normalize((chosen - rejected).mean(0), dim=0)
        still = torch.zeros(s.numel(), s.numel())
        modules[name] = ModuleFactors(U=u, S=s, V=v, rotation_v=still, delta_s=s * delta)
    config = replace(
        adapter.config,
        rank=max(factors.S.numel() for factors in modules.values()),
        directions="triples",
        scale_mode="add2",
        rotate_v=False,
        rotate_u=False,
    )
    return replace(adapter, config=config, modules=modules, evaluation={}, digest=None)
