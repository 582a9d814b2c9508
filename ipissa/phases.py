"""The runtime arithmetic of one adapted linear layer: one matrix product in, phases, one out.

With A_v = Q_v B(θ) Q_vᵀ (`ipissa.rotation.schur_planes`) the factors V Q_v are folded once, at load:

    z = x V Q_v                          (batch, tokens, r), pairs read as complex numbers z₁ + i z₂
    (R_v(α) - I) acts on z as a product with e^{iφ(α)} - 1, and R_v(α) as one with e^{iφ(α)}

so every quantity that depends on α is a small elementwise factor, and the rows of a batch may each
have their own. Each factor is written as a difference from α = 0, hence exactly zero there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ipissa.adapter.checkpoint import AdapterConfig, ModuleFactors
from ipissa.rotation import PHASES, schur_planes
from ipissa.scaling import LINEAR_STEPS, scaled_singular_values

Coefficients = tuple[Tensor, ...]


class Addend(Protocol):
    """What is added to the output of a linear layer."""

    def add(self, output: Tensor, x: Tensor, coefficients: Coefficients) -> Tensor:
        """output + delta; x (batch, tokens, d_in), coefficients with a leading (batch or 1,)."""


class PhaseDelta(Addend, Protocol):
    """What one adapter adds to one layer, with everything that depends on α kept apart from the weights."""

    def coefficients(self, alpha: float) -> Coefficients:
        """The α-dependent factors of one α, computed in float64; without a batch dimension."""


def make_delta(config: AdapterConfig, factors: ModuleFactors, like: Tensor) -> PhaseDelta:
    """The cheapest exact form for this configuration, on the device and in the dtype of `like`."""
    folds = not config.rotate_u and config.scale_mode in LINEAR_STEPS
    return (FoldedDelta if folds else GeneralDelta)(config, factors, like)


class FoldedDelta:
    """Input rotation only, and S(α) - S = α s' with a fixed s': S and s' fold into the output factor.

        y += [(R_v(α) - I) z , α R_v(α) z] [Q_vᵀ diag(S) Uᵀ ; Q_vᵀ diag(s') Uᵀ]

    which is one product with (d_in, r), an elementwise complex one, and one with (2r, d_out).
    """

    def __init__(self, config: AdapterConfig, factors: ModuleFactors, like: Tensor) -> None:
        self._phases = PHASES[config.rotation]
        q, self._theta = schur_planes(factors.rotation_v)
        u, s, v = factors.U.double(), factors.S.double(), factors.V.double()
        self._step = LINEAR_STEPS[config.scale_mode](s, _double(factors.delta_s, s))
        steps = [s] if self._step is None else [s, self._step]
        outputs = torch.stack([(q.mT * step) @ u.mT for step in steps])
        # On a CPU the products of a few rows cost less in float32 than in bfloat16.
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        self.factors = FoldedFactors((v @ q).to(like.device, dtype), outputs.to(like.device, dtype))

    def coefficients(self, alpha: float) -> Coefficients:
        turn = torch.polar(torch.ones_like(self._theta), self._phases(self._theta, alpha))
        parts = [turn - 1] if self._step is None else [turn - 1, alpha * turn]
        return (torch.stack(parts).to(self.factors.inputs.device, torch.complex64),)  # (n, h)

    def add(self, output: Tensor, x: Tensor, coefficients: Coefficients) -> Tensor:
        return self.factors.add(output, x, coefficients)


class FoldedFactors:
    """The two products of `FoldedDelta`, of one adapter or of several side by side.

    Args:
        inputs: V Q_v of every adapter, (d_in, 2h), their planes one after the other.
        outputs: Per step (S, and s' if singular values move) what brings the planes out, (n, 2h, d_out).
    """

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        self.inputs = inputs
        self.steps = outputs.shape[0]
        self._outputs = outputs.flatten(0, 1)

    def add(self, output: Tensor, x: Tensor, coefficients: Coefficients) -> Tensor:
        """output + delta; coefficients ((batch or 1, n, h),).

        In decoding this runs for every adapted layer of every token: it is written in few operations.
        """
        (turns,) = coefficients
        batch, tokens, d_in = x.shape
        z = torch.mm(x.reshape(-1, d_in).to(self.inputs.dtype), self.inputs).float()
        planes = torch.view_as_complex(z.view(batch, tokens, 1, -1, 2))
        turned = torch.view_as_real(turns.unsqueeze(1) * planes)  # (batch, tokens, n, h, 2)
        flat = turned.view(batch * tokens, -1).to(self._outputs.dtype)  # (batch · tokens, n · 2h)
        if flat.dtype == output.dtype:
            return torch.addmm(output.view(batch * tokens, -1), flat, self._outputs).view(output.shape)
        return output + torch.mm(flat, self._outputs).view(output.shape).to(output.dtype)

    @staticmethod
    def side_by_side(factors: Sequence[FoldedFactors]) -> FoldedFactors:
        """One pair of products for several adapters of one layer, which must have equally many steps."""
        if len(factors) == 1:
            return factors[0]
        outputs = [each._outputs.unflatten(0, (each.steps, -1)) for each in factors]
        return FoldedFactors(torch.cat([each.inputs for each in factors], dim=-1), torch.cat(outputs, dim=1))


class GeneralDelta:
    """Any combination: both rotations, any scale mode.

    δ  = [(R_v(α) - I) z Q_vᵀ] S + [R_v(α) z Q_vᵀ] (S(α) - S)          (what the input side adds)
    y += R_u(α)ᵀ-turned δ  +  (R_u(α)ᵀ - I)-turned z Q_vᵀ S            (through Q_u and Uᵀ)
    """

    def __init__(self, config: AdapterConfig, factors: ModuleFactors, like: Tensor) -> None:
        self._phases = PHASES[config.rotation]
        self._scale_mode = config.scale_mode
        self._s, self._d = factors.S.double(), _double(factors.delta_s, factors.S.double())
        q_v, self._theta_v = schur_planes(factors.rotation_v)
        rotation_u = torch.zeros_like(factors.rotation_v) if factors.rotation_u is None else factors.rotation_u
        q_u, self._theta_u = schur_planes(rotation_u)
        self._inputs = (factors.V.double() @ q_v).to(like)  # (d_in, 2h)
        self._to_singular = q_v.mT.to(like.device, torch.float32)  # (2h, r)
        self._to_output_planes = q_u.to(like.device, torch.float32)  # (r, 2h)
        self._outputs = (q_u.mT @ factors.U.double().mT).to(like)  # (2h, d_out)

    def coefficients(self, alpha: float) -> Coefficients:
        device = self._inputs.device
        turn_v = torch.polar(torch.ones_like(self._theta_v), self._phases(self._theta_v, alpha))
        turn_u = torch.polar(torch.ones_like(self._theta_u), -self._phases(self._theta_u, alpha))
        s_alpha = scaled_singular_values(self._s, self._d, self._s.new_tensor([alpha]), mode=self._scale_mode)[0]
        turns_v = torch.stack([turn_v - 1, turn_v, torch.ones_like(turn_v)])  # (3, h)
        scales = torch.stack([self._s, s_alpha - self._s, self._s])  # (3, r)
        turns_u = torch.stack([turn_u, turn_u - 1])  # (2, h)
        return (
            turns_v.to(device, torch.complex64),
            scales.to(device, torch.float32),
            turns_u.to(device, torch.complex64),
        )

    def add(self, output: Tensor, x: Tensor, coefficients: Coefficients) -> Tensor:
        turns_v, scales, turns_u = (part.unsqueeze(1) for part in coefficients)  # (batch, 1, n, ·)
        z = _pairs(x @ self._inputs).unsqueeze(-2)  # (batch, tokens, 1, h)
        singular = torch.view_as_real(turns_v * z).flatten(-2) @ self._to_singular * scales  # (b, t, 3, r)
        changed, base = singular[..., :2, :].sum(-2), singular[..., 2, :]
        planes = _pairs(torch.stack([changed, base], dim=-2) @ self._to_output_planes)  # (b, t, 2, h)
        delta = torch.view_as_real((turns_u * planes).sum(-2)).flatten(-2)  # (b, t, 2h)
        return output + (delta.to(x.dtype) @ self._outputs)


def _pairs(z: Tensor) -> Tensor:
    """Neighbouring columns as complex numbers in float32: (..., 2h) -> (..., h)."""
    return torch.view_as_complex(z.float().unflatten(-1, (-1, 2)))


def _double(delta_s: Tensor | None, s: Tensor) -> Tensor:
    return torch.zeros_like(s) if delta_s is None else delta_s.double()
