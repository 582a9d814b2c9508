"""What training did to every adapted layer, as rows of a table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ipissa.adapter.checkpoint import Adapter, ModuleFactors
from ipissa.adapter.delta import delta_core


@dataclass(frozen=True)
class LayerChange:
    """One adapted layer at α = 1.

    Args:
        module: Its full name.
        largest_angle, mean_angle: Of the planes its input directions turn in, in degrees.
        scaling: ‖S(1) - S‖ / ‖S‖.
        change: ‖ΔW(1)‖ / ‖S‖, the share of the adapted part of the weight that changed.
        even: ‖ΔW(1) + ΔW(-1)‖ / ‖ΔW(1)‖: 0 where the poles are opposite, 2 where they are the same.
    """

    module: str
    largest_angle: float
    mean_angle: float
    scaling: float
    change: float
    even: float


def layer_changes(adapter: Adapter) -> list[LayerChange]:
    """One row per adapted layer, in their order."""
    return [_change(adapter, name, factors) for name, factors in adapter.modules.items()]


def _change(adapter: Adapter, name: str, factors: ModuleFactors) -> LayerChange:
    s = factors.S.double()
    rotation_v = factors.rotation_v.double()
    rotation_u = None if factors.rotation_u is None else factors.rotation_u.double()
    delta_s = None if factors.delta_s is None else factors.delta_s.double()
    positive, negative = delta_core(
        s,
        rotation_v,
        rotation_u,
        delta_s,
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        rotation=adapter.config.rotation,
        scale_mode=adapter.config.scale_mode,
    )
    scaled = delta_core(
        s, None, None, delta_s, torch.ones(1).double(), rotation="cayley", scale_mode=adapter.config.scale_mode
    )
    angles = _angles(rotation_v, adapter.config.rotation)
    return LayerChange(
        module=name,
        largest_angle=math.degrees(float(angles.max())),
        mean_angle=math.degrees(float(angles.mean())),
        scaling=float(scaled.norm() / s.norm()),
        change=float(positive.norm() / s.norm()),
        even=float((positive + negative).norm() / positive.norm().clamp(min=1e-12)),
    )


def _angles(skew: Tensor, rotation: str) -> Tensor:
    """The angle of every plane at α = 1 in radians, (r // 2,)."""
    frequencies = torch.linalg.eigvals(skew).imag.sort(descending=True).values[: skew.shape[0] // 2]
    return 2 * torch.atan(frequencies / 2) if rotation == "cayley" else frequencies
