"""Steer a loaded transformers model, with one α per batch row and several adapters at once.

    steered = attach(model, {"honest": honest, "kind": kind})
    with steered.alpha({"honest": 0.7, "kind": [0, 0.5, 1]}):
        model.generate(...)
    steered.detach()

Forward hooks on the adapted linear layers add each adapter's delta. Weights, module tree and state
dict are never touched, so detaching leaves the model bitwise as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ipissa.adapter.checkpoint import Adapter
from ipissa.base import check_base, find_linear
from ipissa.errors import AlphaError
from ipissa.phases import Coefficients, PhaseDelta, make_delta

Alpha = float | Sequence[float] | Tensor
Rows = tuple[float, ...]  # one α for all batch rows, or one per row
NO_STEERING: Rows = (0.0,)
DEFAULT_CACHE_SIZE = 256
BATCHES_CACHED = 32  # a server alternates between a few running batches


def attach(
    model: PreTrainedModel, adapters: Adapter | Mapping[str, Adapter], *, cache_size: int = DEFAULT_CACHE_SIZE
) -> SteeredModel:
    """Attach one adapter, or several by name, to `model`; α is 0 until set.

    Args:
        model: A transformers model, the base the adapters were made for.
        adapters: One `Adapter`, or a mapping from names to adapters. They add up where they meet.
        cache_size: How many distinct α per adapter keep their phases in memory.

    Raises:
        BaseModelMismatchError: an adapter was made for another base model. Nothing is attached then.
    """
    named = {adapters.name: adapters} if isinstance(adapters, Adapter) else dict(adapters)
    steered = SteeredModel(model, cache_size=cache_size)
    try:
        for name, adapter in named.items():
            steered.add(name, adapter)
    except Exception:
        steered.detach()
        raise
    return steered


class SteeredModel:
    """Handle on a model with adapters attached; made by `attach`."""

    def __init__(self, model: PreTrainedModel, *, cache_size: int = DEFAULT_CACHE_SIZE) -> None:
        self.model = model
        self._cache_size = cache_size
        self._attached: dict[str, _Attached] = {}

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The attached adapters by name."""
        return {name: attached.adapter for name, attached in list(self._attached.items())}

    def add(self, name: str, adapter: Adapter) -> None:
        """Attach one more adapter at α = 0, after checking that it fits the model."""
        if name in self._attached:
            raise ValueError(f"An adapter named {name!r} is attached already; detach it or choose another name.")
        self._attached[name] = _Attached(self.model, adapter, self._cache_size)

    def remove(self, name: str) -> None:
        """Take one adapter off; the others stay."""
        self._attached.pop(name).detach()

    def detach(self) -> None:
        """Take every adapter off; the model is bitwise what it was."""
        for name in list(self._attached):
            self.remove(name)

    @contextmanager
    def alpha(self, value: Alpha | Mapping[str, Alpha]) -> Iterator[SteeredModel]:
        """Steer at `value` inside the block, and as before after it, also when the block raises.

        A number steers all rows; a sequence gives one α per batch row; a mapping gives either to
        adapters by name, and 0 to those it leaves out. NaN and infinite α raise `AlphaError`.
        """
        before = {name: attached.rows for name, attached in self._attached.items()}
        try:
            self.set_alpha(value)
            yield self
        finally:
            for name, attached in self._attached.items():
                attached.set_rows(before.get(name, NO_STEERING))

    def set_alpha(self, value: Alpha | Mapping[str, Alpha]) -> None:
        """Steer at `value` until the next call; see `alpha` for what it may be."""
        rows = {name: _rows(alpha, name) for name, alpha in self._by_name(value).items()}
        lengths = {len(row) for row in rows.values()} - {1}
        if len(lengths) > 1:
            raise AlphaError(f"The adapters were given α for different batch sizes {sorted(lengths)}; use one size.")
        for name, attached in self._attached.items():
            attached.set_rows(rows.get(name, NO_STEERING))

    def phase_cache_info(self) -> dict[str, Any]:
        """Hits, misses, size and capacity of each adapter's phase cache, by adapter name."""
        return {name: attached.phases.cache_info() for name, attached in list(self._attached.items())}

    def _by_name(self, value: Alpha | Mapping[str, Alpha]) -> Mapping[str, Alpha]:
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - set(self._attached))
            if unknown:
                raise AlphaError(f"No adapter named {unknown[0]!r} is attached; attached are {sorted(self._attached)}.")
            return value
        if len(self._attached) != 1:
            raise AlphaError(f"Name the adapter α is for, as in {{name: α}}; attached are {sorted(self._attached)}.")
        return dict.fromkeys(self._attached, value)


class _Attached:
    """One adapter on one model: its hooks, its phases per α, and the α of each batch row."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter, cache_size: int) -> None:
        check_base(model, adapter)
        self.adapter = adapter
        self.rows = NO_STEERING
        modules = {name: find_linear(model, name, adapter) for name in adapter.modules}
        self._deltas: list[PhaseDelta] = [
            make_delta(adapter.config, adapter.modules[name], _reference(model, module))
            for name, module in modules.items()
        ]
        self.phases = lru_cache(maxsize=cache_size)(self._phases_of)
        self._batches = lru_cache(maxsize=BATCHES_CACHED)(self._batch_of)
        self._now: list[Coefficients] | None = None  # per module, stacked over rows; None where all α are 0
        self._handles = [
            module.register_forward_hook(self._hook(index)) for index, module in enumerate(modules.values())
        ]

    def _phases_of(self, alpha: float) -> list[Coefficients]:
        return [delta.coefficients(alpha) for delta in self._deltas]

    def _batch_of(self, rows: Rows) -> list[Coefficients]:
        """Per module, the phases of every row stacked along the batch."""
        per_row = [self.phases(alpha) for alpha in rows]  # [row][module][part]
        return [
            tuple(torch.stack(parts) for parts in zip(*module_rows, strict=True))
            for module_rows in zip(*per_row, strict=True)
        ]

    def set_rows(self, rows: Rows) -> None:
        """Set one α for all rows (length 1), or one per row."""
        self.rows = rows
        self._now = self._batches(rows) if any(rows) else None

    def _hook(self, index: int) -> Any:
        delta = self._deltas[index]

        def add_delta(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._now is None:
                return output
            x = args[0]
            batch = x.shape[0] if x.dim() == 3 else 1
            if len(self.rows) not in (1, batch):
                raise AlphaError(f"{len(self.rows)} α are set for a batch of {batch} rows; set one, or one per row.")
            if x.dim() == 3:
                return delta.add(output, x, self._now[index])
            return delta.add(output[None], x[None], self._now[index])[0]

        return add_delta

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _rows(alpha: Alpha, name: str) -> Rows:
    values: Any = alpha.flatten().tolist() if isinstance(alpha, Tensor) else alpha
    rows = [values] if isinstance(values, Real | str) else list(values)
    if not rows:
        raise AlphaError(f"α for {name!r} is an empty list; give a number or one per row.")
    for value in rows:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise AlphaError(f"α {value!r} for {name!r} is not a finite number.")
    return tuple(float(value) for value in rows)


def _reference(model: PreTrainedModel, module: nn.Module) -> Tensor:
    """A tensor with the device and compute dtype of `module`, also where its weight is quantised."""
    weight = next(module.parameters())
    dtype = weight.dtype if weight.is_floating_point() else model.dtype
    return torch.empty(0, device=weight.device, dtype=dtype)
