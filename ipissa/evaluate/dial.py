"""What can be measured: a model with one α per batch row, whatever turns it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ipissa.adapter.model import layer_alpha
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

    def steered_modules(self) -> Collection[nn.Module]:
        """The modules whose outputs α changes."""
        ...


class ScaledDial:
    """A dial whose α = 1 means `scale` of another's, to compare ways to steer at the same strength."""

    def __init__(self, dial: Dial, scale: float) -> None:
        self._dial = dial
        self.scale = scale

    @property
    def model(self) -> Any:
        """The other's model."""
        return self._dial.model

    def alpha(self, value: float | Sequence[float]) -> AbstractContextManager[Any]:
        """Steer the other at `scale` times the value."""
        if isinstance(value, Real):
            return self._dial.alpha(self.scale * float(value))
        return self._dial.alpha([self.scale * each for each in value])  # type: ignore[union-attr]

    def steered_modules(self) -> Collection[nn.Module]:
        """The other's."""
        return self._dial.steered_modules()


class LayerDial:
    """A dial made of tuner layers that have an α, such as PEFT's after `add_dial`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextmanager
    def alpha(self, value: float | Sequence[float]) -> Iterator[LayerDial]:
        """Steer at a number or at one α per batch row inside the block."""
        with layer_alpha(self.model, torch.as_tensor(value, dtype=torch.float32).reshape(-1)):
            yield self

    def steered_modules(self) -> Collection[nn.Module]:
        """The tuner's layers."""
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]


class HookDial:
    """A dial made of hooks that read `rows`, the α per batch row now in force."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: Tensor | None = None  # (rows,) or (1,); None: not steered
        self._hooks: dict[nn.Module, RemovableHandle] = {}

    def hook(self, module: nn.Module, change: Callable[[Any, Any, Any], Any]) -> None:
        """Let `change`, a forward hook, steer a module."""
        self._hooks[module] = module.register_forward_hook(change)

    def steered_modules(self) -> Collection[nn.Module]:
        """The modules with a hook."""
        return self._hooks.keys()

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
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def per_row(self, like: Tensor) -> Tensor:
        """α, shaped to multiply hidden states (rows, tokens, d)."""
        assert self.rows is not None
        return self.rows.to(like).view(-1, 1, 1)
