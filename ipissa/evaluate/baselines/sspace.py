"""Steering in the singular basis without training: y += α ((x V√S) ∘ δ) (U√S)ᵀ per module.

δ is the unit mean difference of the module's outputs on contrastive pairs in the basis U√S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ipissa.adapter.layer import thin_svd
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
        layers: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in modules}
        found = pair_activations(model, tokenizer, pairs, dict(layers))
        for name, layer in layers.items():
            u, s, v = (part[..., :rank].cpu() for part in thin_svd(layer))
            us, vs = u * s.sqrt(), v * s.sqrt()
            # y · U√S = x Wᵀ U√S = x V S √S
            chosen, rejected = (side @ (vs * s) for side in found.inputs[name])
            delta = nn.functional.normalize((chosen - rejected).mean(0), dim=0)
            self.handles.append(layer.register_forward_hook(self._adding(us, vs * delta)))

    def _adding(self, us: Tensor, vs: Tensor) -> Any:
        def add(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self.rows is None:
                return output
            x = args[0].float()
            change = (x @ vs.to(x)) @ us.to(x).T
            return output + (self.per_row(x) * change).to(output.dtype)

        return add
