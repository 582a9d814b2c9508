"""Give other PEFT tuners the same dial, so that they can be trained and measured as InnerPiSSA is.

For any tuner whose layers call their base layer once, such as LoRA and DoRA,

    y(α) = base(x) + α (tuned(x) - base(x)),

with one α per batch row. For LoRA that is α times its delta; for DoRA it is the straight line through
the tuned layer, which has no α of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ipissa.adapter.layer import InnerPissaLayer


def add_dial(peft_model: nn.Module) -> list[RemovableHandle]:
    """Make `layer_alpha` work on every tuner layer of the model; α is 1, the tuned layer, until set.

    The handles take the dial off again; without that, base layers keep a hook after `unload`.
    """
    handles: list[RemovableHandle] = []
    for layer in peft_model.modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, InnerPissaLayer):
            layer.alpha = 1.0
            handles += _interpolate(layer)
    return handles


def _interpolate(layer: Any) -> list[RemovableHandle]:
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = [output]

    def between(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        base = seen.pop()
        alpha = torch.as_tensor(layer.alpha, dtype=output.dtype, device=output.device).reshape(-1)
        return base + alpha.view(-1, *[1] * (output.dim() - 1)) * (output - base)

    return [layer.get_base_layer().register_forward_hook(keep), layer.register_forward_hook(between)]
