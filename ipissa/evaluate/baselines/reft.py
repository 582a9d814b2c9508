"""LoReFT (arXiv 2404.03592): an edit of the residual stream inside a small subspace, learnt.

    h(α) = h + α Rᵀ (W h + b - R h)        R (rank, d) with orthonormal rows, after each of the last blocks

The published one edits some prompt positions at α = 1 and knows no other α. Here it edits every position
and has a dial, so that it can be trained at both poles under the adapter's own objective. The published one
begins with a random W, which breaks text, and spends its first steps on mending that; here W = R and b = 0
to begin with, where every α is the unsteered model, as for all methods that are trained beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from ipissa.adapter.base_model import blocks_of
from ipissa.evaluate.dial import LayerDial
from ipissa.files import write_whole
from ipissa.train.config import TrainConfig
from ipissa.train.fit import fit
from ipissa.train.objectives.base import Objective

RANK = 4
BLOCKS = 5
LEARNING_RATE = 4e-3
NAME = "loreft"


class LoReft(nn.Module, BaseTunerLayer):
    """The edit after one block; a tuner layer, so that `layer_alpha` turns it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.alpha: float | Tensor = 0.0
        self.subspace = orthogonal(nn.Linear(width, rank, bias=False))  # R
        self.source = nn.Linear(width, rank)  # W, b
        with torch.no_grad():
            self.source.weight.copy_(cast(Tensor, self.subspace.weight))
            self.source.bias.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """h (rows, tokens, d), α a number or (rows,)."""
        alpha = torch.as_tensor(self.alpha, dtype=torch.float32, device=h.device).reshape(-1, 1, 1)
        h32 = h.float()
        edit = (self.source(h32) - self.subspace(h32)) @ self.subspace.weight
        return h + (alpha * edit).to(h.dtype)


class ReftDial(LayerDial):
    """A model with an edit after each of its last blocks."""

    def __init__(self, model: Any, *, seed: int, rank: int = RANK, blocks: int = BLOCKS) -> None:
        super().__init__(model)
        self._blocks = blocks_of(model)[-blocks:]
        width = model.config.get_text_config().hidden_size
        torch.manual_seed(seed)
        self._hooks = []
        for block in self._blocks:
            block.add_module(NAME, LoReft(width, rank).to(model.device))
            self._hooks.append(block.register_forward_hook(_edit))

    def steered_modules(self) -> Collection[nn.Module]:
        """The edited blocks."""
        return self._blocks

    @property
    def edits(self) -> nn.ModuleList:
        """What is learnt."""
        return nn.ModuleList(block.get_submodule(NAME) for block in self._blocks)

    def detach(self) -> None:
        """Leave the model as it was."""
        for hook, block in zip(self._hooks, self._blocks, strict=True):
            hook.remove()
            delattr(block, NAME)


def _edit(block: nn.Module, args: Any, output: Any) -> Any:
    edit = block.get_submodule(NAME)
    return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)


@contextmanager
def trained_reft(
    model: Any, config: TrainConfig, objective: Callable[[], Objective], state: Path
) -> Iterator[ReftDial]:
    """`model` with edits fitted to an objective for the epochs of `config`, none held back; itself again afterwards.

    Args:
        objective: Makes one for this method alone; not asked where the fitting came to its end before.
        state: Folder in which the fitted edits are kept, and found again.
    """
    fitted = state / "reft.pt"
    taught = None if fitted.exists() else objective()  # by the base model, before anything is put on it
    model.requires_grad_(False)
    dial = ReftDial(model, seed=config.seed)
    try:
        if taught is None:
            dial.edits.load_state_dict(torch.load(fitted, weights_only=True))
        else:
            # Checkpoints of a model that is not PEFT's would hold all of its weights.
            # So none is kept, and there is no best one to go back to.
            trainer = {**config.trainer, "save_strategy": "no"}
            # torch keeps the signs of an orthogonal matrix as whole numbers among its parameters: decayed, 1 becomes 0.
            settings = replace(config, lr=LEARNING_RATE, weight_decay=0.0, validation=0.0, trainer=trainer)
            fit(model, taught, settings, state / "reft")
            state.mkdir(parents=True, exist_ok=True)
            write_whole(fitted, lambda partial: torch.save(dial.edits.state_dict(), partial))
        yield dial
    finally:
        dial.detach()
