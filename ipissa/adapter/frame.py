"""Learnt directions: a Cayley rotation of all of a layer's singular vectors, of low rank.

Turning the input of a layer, x -> x R(α), turns every right singular vector of its weight W = U S Vᵀ
and leaves U and S as they are. A full generator of that rotation would be (d_in, d_in). A low rank r
is enough to steer with: of a frame F = [X Y] (d_in, r),

    A = X Yᵀ - Y Xᵀ = F J Fᵀ        J = [[0, 1], [-1, 0]]
    R(α) = 1 + F K(α) Fᵀ            and so ΔW(α)ᵀ = F K(α) (W F)ᵀ

with K (r, r) from the Gram matrix N = Fᵀ F, by the push-through identity:

    Cayley       K(α) = α (1 - (α/2) J N)⁻¹ J
    exponential  K(α) = φ(α J N) α J        φ(M) = (exp M - 1) M⁻¹

The r directions of the frame are mixtures of all singular vectors instead of r of them, chosen by the
objective itself, and a step costs no (d_in, d_in) or singular value decomposition. At the end
`frame_factors` writes the same ΔW(α) with r orthonormal directions and their singular values, in the
form that every adapter has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ipissa.adapter.stored import is_packed

# How many times as far a frame moves as an entry of a dense generator does, per step of Adam: with it one
# learning rate suits both. Divided by sqrt(d_in), so that it suits every width.
GAIN = 20.0


def initial_frame(d_in: int, r: int, std: float) -> Tensor:
    """The free parameter (2, d_in, r / 2) of a frame: X random, Y small.

    As of a LoRA's two factors, one is random, so that a gradient reaches the other from the start.
    """
    x, y = torch.randn(d_in, r // 2) / GAIN, torch.zeros(d_in, r // 2)
    return torch.stack([x, nn.init.trunc_normal_(y, std=std, a=-2 * std, b=2 * std) if std else y])


def frame_of(p: Tensor) -> Tensor:
    """F = [X Y] (d_in, r) of a free parameter (2, d_in, r / 2); a random X has columns of length 1."""
    return torch.cat([p[0], p[1]], dim=1) * (GAIN / p.shape[1] ** 0.5)


def frame_core(frame: Tensor, alpha: Tensor, *, rotation: str) -> Tensor:
    """K(α) of the module's equation; frame (d_in, r), alpha (n,) -> (n, r, r)."""
    j = _pairing(frame)
    return CORES[rotation](j @ (frame.mT @ frame), j, alpha[:, None, None])


def frame_factors(weight: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U (d_out, r), S (r,), V (d_in, r) and A_v (r, r) of the same ΔW(α), in float64.

    V is an orthonormal basis of the frame's span in which W has orthogonal images, W V = U S: the
    singular triples of W on what the frame spans. weight (d_out, d_in), frame (d_in, r).
    """
    basis, triangle = torch.linalg.qr(frame.double())
    u, s, zh = torch.linalg.svd(weight.double() @ basis, full_matrices=False)
    coordinates = zh @ triangle
    a = coordinates @ _pairing(coordinates) @ coordinates.mT
    return u, s, basis @ zh.mT, (a - a.mT) / 2


def images(linear: nn.Linear, weight: Tensor, directions: Tensor) -> Tensor:
    """W times directions (d_in, n), in float32, without keeping a float32 copy of W for the backward pass.

    `weight` is the layer's; a quantised one is asked what it makes of the directions.
    """
    if not is_packed(weight):
        return _Images.apply(directions, weight)
    found = linear.forward(directions.mT)
    return (found if linear.bias is None else found - linear.bias).mT.float()


def _pairing(frame: Tensor) -> Tensor:
    """J (r, r), which pairs the columns of X with those of Y."""
    half = torch.eye(frame.shape[1] // 2, dtype=frame.dtype, device=frame.device)
    return torch.kron(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).to(half), half)


def _cayley_core(jn: Tensor, j: Tensor, alpha: Tensor) -> Tensor:
    identity = torch.eye(len(j), dtype=j.dtype, device=j.device)
    return alpha * torch.linalg.solve(identity - alpha / 2 * jn, j.expand(len(alpha), -1, -1))


def _exponential_core(jn: Tensor, j: Tensor, alpha: Tensor) -> Tensor:
    # exp of [[M, 1], [0, 0]] holds φ(M) in its upper right corner.
    r = len(j)
    blocks = torch.zeros(len(alpha), 2 * r, 2 * r, dtype=j.dtype, device=j.device)
    blocks[:, :r, :r] = alpha * jn
    blocks[:, :r, r:] = torch.eye(r, dtype=j.dtype, device=j.device)
    return alpha * torch.linalg.matrix_exp(blocks)[:, :r, r:] @ j


CORES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cayley": _cayley_core,
    "matrix_exp": _exponential_core,
}


class _Images(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, directions: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.to(directions.dtype) @ directions

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return weight.to(gradients[0].dtype).mT @ gradients[0], None
