"""Activation vectors: α times a fixed direction is added to the residual stream, or to linear layers' outputs.

caa         (arXiv 2312.06681) mean of chosen minus rejected states of contrastive pairs, after blocks
repeng      (and representation engineering, arXiv 2310.01405) the first principal component of the
            differences, centred, signed towards the chosen side of most pairs, after blocks
module_pca  the same for what every linear layer of those blocks gives

Components are made as long as the mean difference, so that α means about the same for all three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ipissa.adapter.base_model import block_names
from ipissa.adapter.layer import dense_weight
from ipissa.data.activations import PairActivations

Directions = dict[str, Tensor]  # (d,) by module name
VECTOR_DEPTH = (1 / 3, 2 / 3)  # blocks that get a vector, as fractions of the depth


def mean_differences(model: Any, found: PairActivations, blocks: Sequence[int]) -> Directions:
    """CAA directions after every block of `blocks`."""
    return _after_blocks(model, found, blocks, lambda difference: difference.mean(0))


def first_components(model: Any, found: PairActivations, blocks: Sequence[int]) -> Directions:
    """repeng directions after every block of `blocks`."""
    return _after_blocks(model, found, blocks, first_component)


def module_components(model: Any, found: PairActivations, blocks: Sequence[int]) -> Directions:
    """Directions in the output of every linear layer of `blocks`, whose inputs must have been read."""
    return {
        # The bias is the same on both sides, so differences of outputs need only the weight.
        name: first_component((found.inputs[name][0] - found.inputs[name][1]) @ dense_weight(layer).cpu().T)
        for name, layer in linear_layers(model, blocks).items()
    }


def linear_layers(model: Any, blocks: Sequence[int]) -> dict[str, Any]:
    """Every linear layer of `blocks`, quantised ones too, by name."""
    names = block_names(model)
    inside = tuple(f"{names[block]}." for block in blocks)
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(inside) and hasattr(module, "in_features")
    }


def first_component(difference: Tensor) -> Tensor:
    """Of differences (pairs, d): the centred first principal component, signed by the majority of pairs."""
    mean = difference.mean(0)
    direction = torch.linalg.svd(difference - mean, full_matrices=False).Vh[0]
    agreeing = (difference @ direction > 0).float().mean()
    return direction * mean.norm() * (1 if agreeing >= 0.5 else -1)


def middle_blocks(model: Any) -> range:
    """The middle third of the blocks."""
    depth = model.config.get_text_config().num_hidden_layers
    first, last = (int(fraction * depth) for fraction in VECTOR_DEPTH)
    return range(first, max(last, first + 1))


def _after_blocks(
    model: Any, found: PairActivations, blocks: Sequence[int], direction: Callable[[Tensor], Tensor]
) -> Directions:
    names = block_names(model)
    return {names[block]: direction(found.stream[block + 1, 0] - found.stream[block + 1, 1]) for block in blocks}
