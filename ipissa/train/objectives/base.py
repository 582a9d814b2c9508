"""What every objective offers the trainer: examples computed once, batches of tensors, a loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from torch import Tensor

from ipissa.errors import ConfigError

Batch = dict[str, Any]  # of tensors, or of such batches by objective in a weighted sum


class Objective(Protocol):
    """One way to teach an adapter what its two poles mean.

    Whatever the base model has to say (teachers, reference states) is in the examples, computed
    before the adapter exists, so that no step runs the base model.
    """

    prompts: Collection[str]
    rows_per_example: int

    def examples(self, prompts: Collection[str]) -> Sequence[Any]:
        """What these prompts teach, of `self.prompts`; empty if they do not teach everything there is to learn."""
        ...

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Examples as padded tensors."""
        ...

    def loss(self, model: Any, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise and the figures to log, after the fraction `progress` of training."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the examples; plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


def cycled(*sides: Sequence[Any]) -> list[tuple[Any, ...]]:
    """One of every side together, shorter ones over again until none of the longest is left out."""
    if not all(sides):
        return []
    return [tuple(side[i % len(side)] for side in sides) for i in range(max(map(len, sides)))]


class WeightedSum:
    """Several objectives on one adapter; an epoch is one pass over the longest of them."""

    def __init__(self, parts: dict[str, tuple[float, Objective]]) -> None:
        self.parts = parts
        self.rows_per_example = sum(objective.rows_per_example for _, objective in parts.values())
        taught = (objective.prompts for _, objective in parts.values())
        self.prompts: Collection[str] = dict.fromkeys(itertools.chain.from_iterable(taught))

    def examples(self, prompts: Collection[str]) -> Sequence[Any]:
        """One example of every part, the shorter parts over again."""
        parts = {name: objective.examples(prompts) for name, (_, objective) in self.parts.items()}
        return [dict(zip(parts, together, strict=True)) for together in cycled(*parts.values())]

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """One batch per objective."""
        return {
            name: objective.collate([example[name] for example in examples])
            for name, (_, objective) in self.parts.items()
        }

    def loss(self, model: Any, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ weight · loss, figures named by objective."""
        figures: dict[str, Tensor] = {}
        losses = []
        for name, (weight, objective) in self.parts.items():
            loss, own = objective.loss(model, batch[name], progress)
            losses.append(weight * loss)
            figures |= {f"{name}/{figure}": value for figure, value in own.items()}
        return sum(losses[1:], losses[0]), figures

    def state_dict(self) -> dict[str, Any]:
        """Of every part by name."""
        return {name: objective.state_dict() for name, (_, objective) in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, (_, objective) in self.parts.items():
            objective.load_state_dict(state[name])


def check_weights(config: Any, names: Sequence[str]) -> None:
    """Refuse weights and thresholds below 0 or without end.

    Raises:
        ConfigError: it names the first.
    """
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ConfigError(f"{name} {getattr(config, name)} is negative or not finite; 0 leaves it out.")
