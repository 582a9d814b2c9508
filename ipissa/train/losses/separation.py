"""Push chosen and rejected states apart along the trait's direction: the published contrastive losses.

    p(c)   = mean over the last tokens of (z_chosen - z_rejected) · u, under coefficient c
    p_ref  = the same with the adapter off
    p_π(+1) = p(+1),  p_π(-1) = -p(-1): at -1 the roles swap
    D      = symlog p_π - symlog |p_ref|,  ratio = p_π / |p_ref|

Every loss falls as p_π grows. The published `tanh_sym` lacks its minus sign; here it has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ipissa.train.processes import averaged

MIN_REFERENCE = 1e-7


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|): odd, monotone, linear at 0."""
    return x.sign() * x.abs().log1p()


def separation(z_chosen: Tensor, z_rejected: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    """p per pair: masked mean over tokens of the projected difference.

    Args:
        z_chosen, z_rejected: (pairs, tokens, k).
        u: Unit direction (k,), or several (directions, k), which combine to a signed L2 norm:
            the norm of the projections with the sign of their mean.
        mask: True where a pair has a token, (pairs, tokens).

    Returns:
        (pairs,).
    """
    projected = (z_chosen - z_rejected) @ u.reshape(-1, u.shape[-1]).T  # (pairs, tokens, directions)
    along = projected[..., 0] if projected.shape[-1] == 1 else projected.mean(-1).sign() * projected.norm(dim=-1)
    return masked_mean(along, mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens where `mask` holds; (rows, tokens) -> (rows,)."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


@dataclass(frozen=True)
class SeparationLoss:
    """A loss of D and of the ratio, and what it makes of the coherence term beside it."""

    of: Callable[[Tensor, Tensor], Tensor]
    coherence: Callable[[Tensor], Tensor] = lambda c: c


SEPARATION_LOSSES: dict[str, SeparationLoss] = {
    "raw": SeparationLoss(lambda d, ratio: -d),
    "softpl_strong_up": SeparationLoss(lambda d, ratio: -softplus(0.1 * d)),
    "logsig_weak_up": SeparationLoss(lambda d, ratio: -logsigmoid(0.1 * (d - 1)), lambda c: 0 * c),
    "logsig_dpo": SeparationLoss(lambda d, ratio: -logsigmoid(0.1 * d)),
    "focal_balanced": SeparationLoss(lambda d, ratio: -((1 - d.sigmoid()) ** 2) * logsigmoid(d)),
    "softpl_ratio": SeparationLoss(lambda d, ratio: -softplus(ratio - 1), lambda c: 3 * torch.tanh(c / 3)),
    "tanh_sym": SeparationLoss(lambda d, ratio: -torch.tanh(0.1 * ratio), torch.tanh),
}


def separation_loss(p: Tensor, p_ref: Tensor, *, pole: int, kind: str) -> Tensor:
    """Loss per pair of `SEPARATION_LOSSES[kind]` at a pole; p and p_ref (pairs,) -> (pairs,)."""
    reference = p_ref.abs().clamp(min=MIN_REFERENCE)
    p_pi = pole * p
    return SEPARATION_LOSSES[kind].of(symlog(p_pi) - symlog(reference), p_pi / reference)


class SignFlip:
    """Which way round the poles go, from a running mean, for the whole model or for each layer.

    The initial adapter is random, so α = +1 may begin on the rejected side, and fighting that costs
    training. The decision is the sign of an exponential mean of symlog p(+1) - symlog p(-1), which
    has expectation 0 at initialisation. (The published rule uses the sum of both losses, which is
    positive at the start by construction and so always flips.)

    Args:
        decay: Weight of the past in the running mean.
        per_layer: Decide for every layer by itself.
    """

    def __init__(self, *, decay: float = 0.9, per_layer: bool = False) -> None:
        self.decay, self.per_layer = decay, per_layer
        self.evidence: dict[str, float] = {}

    def update(self, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, int]:
        """The sign of every layer, after seeing p(+1) and p(-1) of one batch by layer name, in all processes."""
        seen = {name: float((symlog(positive[name]) - symlog(negative[name])).mean()) for name in positive}
        if not self.per_layer:
            seen = {"": sum(seen.values()) / len(seen)}
        for key, value in averaged(seen).items():
            self.evidence[key] = self.decay * self.evidence.get(key, 0.0) + (1 - self.decay) * value
        return self.signs(positive)

    def signs(self, names: Iterable[str]) -> dict[str, int]:
        """The sign of every layer as decided so far."""
        return {name: -1 if self.evidence.get(name if self.per_layer else "", 0.0) < 0 else 1 for name in names}

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return dict(self.evidence)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state_dict`."""
        self.evidence = dict(state)
