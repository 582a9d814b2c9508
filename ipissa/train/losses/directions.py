"""The direction of a trait in a module's singular basis, from states of contrastive pairs.

States are z = h B (pairs, k): last-token hidden states in a basis B of right singular vectors (what
a module reads) or left ones (what it writes). Every method returns a unit vector u (k,) that points
from rejected to chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

PCA_DIMS = 64  # principal components are those of the leading dimensions
SNORM_FLOOR = 0.1  # times the median singular value


@dataclass(frozen=True)
class PairStates:
    """Last-token states of the training pairs in one module's basis.

    Args:
        chosen, rejected: (pairs, k), float32.
        S: Singular values of the basis, falling, (k,).
        dims: How many dimensions the masked methods keep.
        snormed: Whether the states are already in units of the singular values, as x V is: y U = S ∘ (x V).
    """

    chosen: Tensor
    rejected: Tensor
    S: Tensor
    dims: int = 16
    snormed: bool = False

    @property
    def difference(self) -> Tensor:
        """Chosen minus rejected, pair by pair, (pairs, k)."""
        return self.chosen - self.rejected

    def relative(self, z: Tensor) -> Tensor:
        """z (.., k) in units of the singular values, once."""
        return z if self.snormed else snorm(z, self.S)


def mean(states: PairStates) -> Tensor:
    """The mean difference; without a mask the basis cancels if it is square."""
    return normalize(states.difference.mean(0), dim=0)


def pca(states: PairStates, components: int) -> Tensor:
    """The mean difference within the top principal components of the centred differences."""
    leading = states.difference[:, :PCA_DIMS]
    basis = torch.linalg.svd(leading - leading.mean(0), full_matrices=False).Vh[:components]
    direction = torch.zeros_like(states.S)
    direction[: leading.shape[1]] = leading.mean(0) @ basis.T @ basis
    return normalize(direction, dim=0)


def top_s(states: PairStates) -> Tensor:
    """The mean difference in the dimensions of the largest singular values."""
    return _masked(states, states.S.topk(_dims(states)).indices)


def top_diff(states: PairStates) -> Tensor:
    """The mean difference in the dimensions where it is largest."""
    return _masked(states, states.difference.mean(0).abs().topk(_dims(states)).indices)


def top_diff_snorm(states: PairStates) -> Tensor:
    """The mean difference in the dimensions where it is largest relative to the singular value."""
    relative = states.relative(states.difference.mean(0)).abs()
    return _masked(states, relative.topk(_dims(states)).indices)


def adapter_dims(states: PairStates) -> Tensor:
    """The mean difference in the dimensions of largest S-normed variance, half by chosen, half by rejected."""
    return _masked(states, _variance_dims(states.relative(states.chosen), states.relative(states.rejected), states))


def adapter_dims_raw(states: PairStates) -> Tensor:
    """`adapter_dims` by plain variance."""
    return _masked(states, _variance_dims(states.chosen, states.rejected, states))


DIRECTIONS: dict[str, Callable[[PairStates], Tensor]] = {
    "mean": mean,
    "pca1": lambda states: pca(states, 1),
    "pca2": lambda states: pca(states, 2),
    "pca4": lambda states: pca(states, 4),
    "top_s": top_s,
    "top_diff": top_diff,
    "top_diff_snorm": top_diff_snorm,
    "adapter_dims": adapter_dims,
    "adapter_dims_raw": adapter_dims_raw,
}


def snorm(z: Tensor, S: Tensor) -> Tensor:
    """z / max(S, 0.1 median S): every dimension in units of its singular value, tiny ones left alone."""
    return z / S.clamp(min=SNORM_FLOOR * float(S.median()))


def _dims(states: PairStates) -> int:
    return min(states.dims, states.S.numel())


def _masked(states: PairStates, kept: Tensor) -> Tensor:
    direction = torch.zeros_like(states.S)
    direction[kept] = states.difference.mean(0)[kept]
    return normalize(direction, dim=0)


def _variance_dims(chosen: Tensor, rejected: Tensor, states: PairStates) -> Tensor:
    count = _dims(states)
    first = chosen.var(0).topk(count - count // 2).indices
    free = rejected.var(0)
    free[first] = -torch.inf
    return torch.cat([first, free.topk(count // 2).indices])
