"""Steering in the singular basis without training: y += α ((x V√S) ∘ δ) (U√S)ᵀ per module.

δ is the unit mean difference of the module's outputs on contrastive pairs in the basis U√S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ipissa.data.activations import pair_activations
from ipissa.data.pairs import ContrastivePair
from ipissa.evaluate.dial import HookDial


class SSpaceDial(HookDial):
    """The untrained relative of an adapter, on the same modules and rank.

    Args:
        modules: Full names of linear layers.
        rank: Leading singular triples per module.
    """

    def __init__(
        self, model: Any, tokenizer: Any, pairs: Sequence[ContrastivePair], modules: Sequence[str], *, rank: int
    ) -> None:
        super().__init__(model)
        layers: dict[str, nn.Module] = {name: model.get_submodule(name) for name in modules}
        found = pair_activations(model, tokenizer, pairs, layers)
        for name, layer in layers.items():
            weight = cast(Tensor, layer.weight).detach().float().cpu()
            u, s, vh = (part[..., :rank] for part in _thin_svd(weight))
            us, vs = u * s.sqrt(), vh * s.sqrt()
            chosen, rejected = (side @ weight.T @ us for side in found.inputs[name])
            delta = nn.functional.normalize((chosen - rejected).mean(0), dim=0)
            self.handles.append(layer.register_forward_hook(self._adding(us.to(weight), vs * delta)))

    def _adding(self, us: Tensor, vs: Tensor) -> Any:
        def add(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self.rows is None:
                return output
            x = args[0].float()
            change = (x @ vs.to(x)) @ us.to(x).T
            return output + (self.per_row(x) * change).to(output.dtype)

        return add


def _thin_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), S (k,), V (d_in, k)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u, s, vh.T
