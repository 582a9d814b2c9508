"""What every objective offers the trainer: examples computed once, batches of tensors, a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

Batch = dict[str, Any]  # of tensors, or of such batches by objective in a weighted sum


class Objective(Protocol):
    """One way to teach an adapter what its two poles mean.

    Whatever the base model has to say (teachers, reference states) is in the examples, computed
    before the adapter exists, so that no step runs the base model.
    """

    examples: Sequence[Any]

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


class WeightedSum:
    """Several objectives on one adapter; an epoch is one pass over the longest of them."""

    def __init__(self, parts: dict[str, tuple[float, Objective]]) -> None:
        self.parts = parts
        longest = max(len(objective.examples) for _, objective in parts.values())
        self.examples: Sequence[Any] = [
            {name: objective.examples[i % len(objective.examples)] for name, (_, objective) in parts.items()}
            for i in range(longest)
        ]

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
