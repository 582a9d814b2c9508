"""How a layer's weight is stored: as the numbers it multiplies with, or packed."""

from __future__ import annotations

from torch import Tensor


def is_packed(weight: Tensor) -> bool:
    """Whether the numbers of a quantised weight mean something else than they are.

    They are integers, or floats of eight bits, which are multiplied with a scale that the layer keeps elsewhere.
    """
    return not weight.is_floating_point() or weight.element_size() == 1
