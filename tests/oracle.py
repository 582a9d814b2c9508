"""The definition of an adapter, computed a second time: numpy, float64, one linear solve per module.

Shares no code with ipissa, so that agreement means both are right.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import scipy.linalg
import torch


def rotation(a: np.ndarray, alpha: float, method: str) -> np.ndarray:
    """R(α) of one skew matrix."""
    identity = np.eye(len(a))
    if method == "cayley":
        return np.linalg.solve(identity - alpha * a / 2, identity + alpha * a / 2)
    return scipy.linalg.expm(alpha * a)


def scaled(factors: Any, config: Any, alpha: float) -> np.ndarray:
    """S(α), (r,)."""
    s = np.asarray(factors.S, dtype=np.float64)
    d = np.zeros_like(s) if factors.delta_s is None else np.asarray(factors.delta_s, dtype=np.float64)
    return {
        "add2": s + alpha * d,
        "add_tanh": s + alpha * np.tanh(d) * s,
        "mult": s * np.exp(alpha * d),
        "none": s,
    }[config.scale_mode]


def delta_weight(factors: Any, config: Any, alpha: float) -> np.ndarray:
    """ΔW(α) = U [R_u diag(S(α)) R_vᵀ - diag(S)] Vᵀ, shape (d_out, d_in)."""
    u, s, v = (np.asarray(value, dtype=np.float64) for value in (factors.U, factors.S, factors.V))
    r_v = rotation(np.asarray(factors.rotation_v, dtype=np.float64), alpha, config.rotation)
    r_u = np.eye(len(s))
    if factors.rotation_u is not None:
        r_u = rotation(np.asarray(factors.rotation_u, dtype=np.float64), alpha, config.rotation)
    return u @ (r_u @ np.diag(scaled(factors, config, alpha)) @ r_v.T - np.diag(s)) @ v.T


def edited_model(model: Any, adapters: list[tuple[Any, float]]) -> Any:
    """A copy of `model` whose weights are W + Σ ΔW(α), each sum taken in float64."""
    edited = copy.deepcopy(model)
    totals: dict[str, np.ndarray] = {}
    for adapter, alpha in adapters:
        for name, factors in adapter.modules.items():
            totals[name] = totals.get(name, 0.0) + delta_weight(factors, adapter.config, alpha)
    with torch.no_grad():
        for name, delta in totals.items():
            weight = edited.get_submodule(name).weight
            weight.copy_((weight.double() + torch.from_numpy(delta)).to(weight.dtype))
    return edited
