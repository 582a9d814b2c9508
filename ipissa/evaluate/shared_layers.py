"""Compute once, for all α of a text, what α does not change: the layers before the first steered one.

texts (n, tokens) -> layers before the first steered -> n rows -> repeated, n · times rows -> the others
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from ipissa.adapter.base_model import blocks_of
from ipissa.evaluate.dial import Dial

T = TypeVar("T")
Repeat = Callable[[Sequence[T]], list[T]]


@contextmanager
def rows_repeated(dial: Dial, times: int) -> Iterator[Repeat]:
    """Inside, calls of the dial's model give `times` equal rows, next to each other, per row they are given.

    Yields what must be applied to a batch before such a call: it repeats rows that have to enter the model
    repeated already, because something outside the decoder layers is steered, and is otherwise the identity.
    """
    layers = blocks_of(dial.model)
    first = _first_steered(dial, layers)
    if first is None or times == 1 or _not_by_rows(dial.model):
        yield lambda rows: [row for row in rows for _ in range(times)]
        return
    with ExitStack() as hooks:
        repetition = _Repetition(times)
        for index, layer in enumerate(layers[first:]):
            hook = repetition.enter if index == 0 else repetition.go_on
            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield list


def _first_steered(dial: Dial, layers: list[nn.Module]) -> int | None:
    """Index of the first layer with a steered module, the last one if none is; None if one is outside."""
    owner = {module: index for index, layer in enumerate(layers) for module in layer.modules()}
    steered = dial.steered_modules()
    if any(module not in owner for module in steered):
        return None
    return min((owner[module] for module in steered), default=len(layers) - 1)


def _not_by_rows(model: Any) -> bool:
    """Whether layers read keys that others left behind, or states whose first dimension is not rows (Gemma 3n)."""
    config = model.config.get_text_config()
    return any(getattr(config, name, 0) for name in ("num_kv_shared_layers", "altup_num_inputs"))


class _Repetition:
    """Pre-hooks that repeat hidden states once, and masks and positions for every layer from then on."""

    def __init__(self, times: int) -> None:
        self._times = times
        self._rows = 0
        self._repeated: dict[int, tuple[Tensor, Tensor]] = {}  # by identity; the original is kept alive

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """For the first steered layer."""
        states, *rest = args
        self._rows = states.shape[0]
        self._repeated.clear()
        return (states.repeat_interleave(self._times, 0), *self._wide(tuple(rest))), self._wide(kwargs)

    def go_on(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """For the layers after it, whose states are repeated already."""
        states, *rest = args
        return (states, *self._wide(tuple(rest))), self._wide(kwargs)

    def _wide(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._wide(each) for name, each in value.items()}
        if isinstance(value, tuple):
            return tuple(self._wide(each) for each in value)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != self._rows:
            return value
        if id(value) not in self._repeated:
            self._repeated[id(value)] = (value, value.repeat_interleave(self._times, 0))
        return self._repeated[id(value)][1]
