"""The runtime arithmetic of one activation vector: y += α d, each row at its own α."""

from __future__ import annotations

import torch
from torch import Tensor

from ipissa.phases import Coefficients


class VectorDelta:
    """Adds α times a direction (d,) to a module's output."""

    def __init__(self, direction: Tensor, like: Tensor) -> None:
        self._direction = direction.to(like)

    def coefficients(self, alpha: float) -> Coefficients:
        """α itself, (1,)."""
        return (torch.tensor([alpha], dtype=torch.float64).to(self._direction),)

    def add(self, output: Tensor, x: Tensor, coefficients: Coefficients) -> Tensor:
        """output + α d; coefficients ((batch or 1, 1),)."""
        (alpha,) = coefficients
        return output + alpha.unsqueeze(1) * self._direction
