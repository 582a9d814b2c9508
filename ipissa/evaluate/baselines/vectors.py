"""Activation vectors: α times a fixed direction is added to the residual stream after some blocks.

mean difference  CAA (arXiv 2312.06681): mean of chosen minus rejected states of contrastive pairs
first component  repeng and representation engineering (arXiv 2310.01405): the leading singular
                 direction of the differences, signed towards the mean, as long as the mean
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ipissa.data.activations import pair_activations
from ipissa.data.pairs import ContrastivePair
from ipissa.evaluate.dial import HookDial


class VectorDial(HookDial):
    """Adds α · scale · direction after each block.

    Args:
        directions: One (d,) per block index.
    """

    def __init__(self, model: Any, directions: Mapping[int, Tensor]) -> None:
        super().__init__(model)
        layers = model.get_decoder().layers
        for block, direction in directions.items():
            placed = direction.to(next(layers[block].parameters()))
            self.handles.append(layers[block].register_forward_hook(self._adding(placed)))

    def _adding(self, direction: Tensor) -> Any:
        def add(module: Any, args: Any, output: Any) -> Any:
            if self.rows is None:
                return output
            states = output[0] if isinstance(output, tuple) else output
            steered = states + self.per_row(states) * direction
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return add


def mean_differences(
    model: Any, tokenizer: Any, pairs: Sequence[ContrastivePair], blocks: Sequence[int]
) -> dict[int, Tensor]:
    """CAA directions after every block of `blocks`."""
    difference = _differences(model, tokenizer, pairs)
    return {block: difference[block + 1].mean(0) for block in blocks}


def first_components(
    model: Any, tokenizer: Any, pairs: Sequence[ContrastivePair], blocks: Sequence[int]
) -> dict[int, Tensor]:
    """repeng directions after every block of `blocks`."""
    difference = _differences(model, tokenizer, pairs)
    return {block: _first_component(difference[block + 1]) for block in blocks}


def _differences(model: Any, tokenizer: Any, pairs: Sequence[ContrastivePair]) -> Tensor:
    stream = pair_activations(model, tokenizer, pairs, {}).stream
    return stream[:, 0] - stream[:, 1]  # (blocks + 1, pairs, d)


def _first_component(difference: Tensor) -> Tensor:
    mean = difference.mean(0)
    direction = torch.linalg.svd(difference, full_matrices=False).Vh[0]
    return direction * mean.norm() * (1 if direction @ mean >= 0 else -1)
