"""What can be measured: a model with one α per batch row, whatever turns it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ipissa.errors import AlphaError


class Dial(Protocol):
    """A steered model: adapters attached by `ipissa.attach`, or a baseline."""

    @property
    def model(self) -> Any:
        """The transformers model that is steered."""
        ...

    def alpha(self, value: Any) -> AbstractContextManager[Any]:
        """Steer at a number, or at one α per batch row, inside the block; at 0 outside."""
        ...


class HookDial:
    """A dial made of hooks that read `rows`, the α per batch row now in force; base of the baselines."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.scale = 1.0  # what α = 1 means
        self.rows: Tensor | None = None  # (rows,) or (1,); None: not steered
        self.handles: list[RemovableHandle] = []

    @contextmanager
    def alpha(self, value: float | Sequence[float]) -> Iterator[HookDial]:
        """Steer inside the block, and as before after it.

        Raises:
            AlphaError: an α is not finite.
        """
        rows = torch.as_tensor(value, dtype=torch.float32).reshape(-1)
        if not rows.isfinite().all():
            raise AlphaError(f"α {value} is not finite; use numbers such as 0.5.")
        before, self.rows = self.rows, rows if rows.any() else None
        try:
            yield self
        finally:
            self.rows = before

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()

    def per_row(self, like: Tensor) -> Tensor:
        """α times the scale, shaped to multiply hidden states (rows, tokens, d)."""
        assert self.rows is not None
        return (self.scale * self.rows).to(like).view(-1, 1, 1)
