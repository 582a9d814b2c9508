"""Rotations from skew-symmetric matrices, and their phase form.

A real skew matrix A = -Aᵀ generates a family of rotations R(α), one for every real α:

    Cayley       R(α) = (I - αA/2)⁻¹ (I + αA/2)
    exponential  R(α) = exp(αA)

Both obey R(-α) = R(α)ᵀ = R(α)⁻¹ and R(0) = I. Both leave the planes of A's real Schur form
A = Q B(θ) Qᵀ invariant and turn plane k by a phase:

    Cayley       φ_k(α) = 2 atan(α θ_k / 2)
    exponential  φ_k(α) = α θ_k

so that R(α) = Q rot(φ(α)) Qᵀ, and a new α costs r/2 sines and cosines instead of a linear solve.
`cayley` and `matrix_exp` are the definitions, used in training and as the reference in tests; the
phase form is what the runtime multiplies with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from ipissa.errors import ConfigError


def skew(p: Tensor) -> Tensor:
    """The skew-symmetric matrix A = P - Pᵀ of a free square parameter P, (..., r, r)."""
    return p - p.mT


# --- alpha -> rotation, by definition ---------------------------------------------------------


def cayley(a: Tensor, alpha: Tensor) -> Tensor:
    """R(α) = (I - αA/2)⁻¹ (I + αA/2) by a linear solve; a (r, r), alpha (n,) -> (n, r, r)."""
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    x = alpha[:, None, None] * a / 2
    return torch.linalg.solve(identity - x, identity + x)


def matrix_exp(a: Tensor, alpha: Tensor) -> Tensor:
    """R(α) = exp(αA); a (r, r), alpha (n,) -> (n, r, r)."""
    return torch.linalg.matrix_exp(alpha[:, None, None] * a)


ROTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cayley": cayley, "matrix_exp": matrix_exp}


# --- alpha -> phases --------------------------------------------------------------------------


def cayley_phases(theta: Tensor, alpha: float) -> Tensor:
    """φ(α) = 2 atan(αθ/2) in radians; theta (planes,)."""
    return 2 * torch.atan(alpha * theta / 2)


def exponential_phases(theta: Tensor, alpha: float) -> Tensor:
    """φ(α) = αθ in radians; theta (planes,)."""
    return alpha * theta


PHASES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "cayley": cayley_phases,
    "matrix_exp": exponential_phases,
}


def schur_planes(a: Tensor) -> tuple[Tensor, Tensor]:
    """The invariant planes of a skew matrix, from its real Schur form in float64.

    Returns (Q, θ): Q (r, 2h) with columns (2k, 2k+1) spanning plane k, and θ (h,) its frequency,
    h = ceil(r/2). An odd r leaves one direction that does not turn: its partner is a zero column.
    In row-vector convention the pair (z₁, z₂) of x Q turns as (z₁ + i z₂) e^{iφ}.
    """
    r = a.shape[-1]
    block, q = scipy.linalg.schur(a.detach().to("cpu", torch.float64).numpy(), output="real")
    pairs, fixed, i = [], [], 0
    while i < r:
        if i + 1 < r and block[i + 1, i] != 0:
            pairs.append((i, i + 1))
            i += 2
        else:
            fixed.append(i)
            i += 1
    theta = [(block[i, j] - block[j, i]) / 2 for i, j in pairs] + [0.0] * ((len(fixed) + 1) // 2)
    columns = [q[:, [index for pair in pairs for index in pair] + fixed]]
    if len(fixed) % 2:
        columns.append(np.zeros((r, 1)))
    return torch.from_numpy(np.concatenate(columns, axis=1)), torch.tensor(theta, dtype=torch.float64)


# --- soft clamps on A -------------------------------------------------------------------------


def clamp_entries(a: Tensor, limit: float, rotation: str) -> Tensor:
    """m tanh(A/m), entry by entry, as published.

    This bounds matrix entries by m, not angles: a saturated 64 x 64 matrix still turns by more
    than two radians. `clamp_angles` bounds what the name suggests.
    """
    return limit * torch.tanh(a / limit)


def clamp_angles(a: Tensor, limit: float, rotation: str) -> Tensor:
    """Bound every plane's angle at |α| = 1 by `limit` radians, softly, keeping the planes.

    Each frequency θ becomes L tanh(θ/L), where L is the frequency whose angle is `limit`:
    2 tan(limit/2) for Cayley, `limit` for the exponential.

    Raises:
        ConfigError: the limit is beyond what Cayley turns.
    """
    if rotation == "cayley":
        check_angle(limit)
        limit = 2 * float(np.tan(limit / 2))
    return _SkewTanh.apply(a, limit)


def check_angle(limit: float) -> None:
    """Refuse a limit for angles that Cayley rotations never reach."""
    if not limit < torch.pi:
        raise ConfigError(f"max_rotation {limit} is not below pi, which is as far as Cayley turns.")


def clamp_nothing(a: Tensor, limit: float, rotation: str) -> Tensor:
    """A as it is."""
    return a


CLAMPS: dict[str, Callable[[Tensor, float, str], Tensor]] = {
    "entries": clamp_entries,
    "angles": clamp_angles,
    "none": clamp_nothing,
}


class _SkewTanh(torch.autograd.Function):
    """f(A) for skew A, with f(iθ) = i L tanh(θ/L) on the spectrum.

    -iA is Hermitian with real eigenvalues θ, so f(A) = i V diag(L tanh(θ/L)) Vᴴ. The gradient is the
    Daleckii-Krein formula V (K ∘ Vᴴ G V) Vᴴ with divided differences K, which stays finite where
    frequencies coincide; autograd through `eigh` does not.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, limit: float) -> Tensor:
        theta, v = torch.linalg.eigh(-1j * a.to(torch.complex128))
        clamped = limit * torch.tanh(theta / limit)
        ctx.save_for_backward(theta, clamped, v)
        ctx.limit = limit
        return (1j * (v * clamped) @ v.mH).real.to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        theta, clamped, v = ctx.saved_tensors
        gap = theta[:, None] - theta[None, :]
        close = gap.abs() < 1e-9 * (1 + theta.abs().max())
        slope = 1 - torch.tanh(theta / ctx.limit) ** 2
        ratio = torch.where(close, slope[:, None], (clamped[:, None] - clamped[None, :]) / torch.where(close, 1, gap))
        g = v.mH @ grad.to(torch.complex128) @ v
        return (v @ (ratio * g) @ v.mH).real.to(grad.dtype), None
