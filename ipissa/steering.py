"""Steer a loaded transformers model, with one α per batch row and several adapters at once.

    steered = attach(model, {"honest": honest, "kind": kind})
    with steered.alpha({"honest": 0.7, "kind": [0, 0.5, 1]}):
        model.generate(...)
    steered.detach()

Forward hooks on the adapted layers add each adapter's delta. Weights, module tree and state
dict are never touched, so detaching leaves the model bitwise as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ipissa.adapter.base_model import check_base, find_added_to, find_linear
from ipissa.adapter.checkpoint import Adapter, AnyAdapter
from ipissa.adapter.stored import is_packed
from ipissa.buckets import MAX_ALPHA
from ipissa.errors import AlphaError
from ipissa.phases import Addend, Coefficients, FoldedDelta, FoldedFactors, PhaseDelta, make_delta
from ipissa.vectors import VectorDelta

Alpha = float | Sequence[float] | Tensor
Rows = tuple[float, ...]  # one α for all batch rows, or one per row
DEFAULT_CACHE_SIZE = 256
BATCHES_CACHED = 32  # a server alternates between a few running batches
ROWS_CACHED = 256  # of a batch that is kept: those of sweeps are large, and seldom asked for again
Application = tuple[Addend, Coefficients]
STACKS_CACHED = 8  # combinations of adapters whose factors are kept side by side


def attach(
    model: PreTrainedModel, adapters: AnyAdapter | Mapping[str, AnyAdapter], *, cache_size: int = DEFAULT_CACHE_SIZE
) -> SteeredModel:
    """Attach one adapter, or several by name, to `model`; α is 0 until set.

    Args:
        model: A transformers model, the base the adapters were made for.
        adapters: One `Adapter`, or a mapping from names to adapters. They add up where they meet.
        cache_size: How many distinct α per adapter keep their phases in memory.

    Raises:
        BaseModelMismatchError: an adapter was made for another base model. Nothing is attached then.
    """
    named = dict(adapters) if isinstance(adapters, Mapping) else {adapters.name: adapters}
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
        self._hooks: dict[str, list[RemovableHandle]] = {}  # by module
        self._rows: dict[str, Rows] = {}  # α now in force, of adapters that are not at 0
        self._now: dict[str, list[Application]] = {}  # what each module's hook does
        self._forget()

    @property
    def adapters(self) -> dict[str, AnyAdapter]:
        """The attached adapters by name."""
        return {name: attached.adapter for name, attached in list(self._attached.items())}

    def add(self, name: str, adapter: AnyAdapter) -> None:
        """Attach one more adapter at α = 0, after checking that it fits the model."""
        if name in self._attached:
            raise ValueError(f"An adapter named {name!r} is attached already; detach it or choose another name.")
        self._attached[name] = _Attached(self.model, adapter, self._cache_size)
        for module in adapter.modules:
            if module not in self._hooks:
                self._hooks[module] = self._hook(module)
        self._forget()

    def remove(self, name: str) -> None:
        """Take one adapter off; the others stay."""
        del self._attached[name]
        used = {module for attached in self._attached.values() for module in attached.deltas}
        for module in set(self._hooks) - used:
            for hook in self._hooks.pop(module):
                hook.remove()
        self._forget()
        self._apply({other: rows for other, rows in self._rows.items() if other != name})

    def detach(self) -> None:
        """Take every adapter off; the model is bitwise what it was."""
        for name in list(self._attached):
            self.remove(name)

    @contextmanager
    def alpha(self, value: Alpha | Mapping[str, Alpha]) -> Iterator[SteeredModel]:
        """Steer at `value` inside the block, and as before after it, also when the block raises.

        A number steers all rows; a sequence gives one α per batch row; a mapping gives either to
        adapters by name, and 0 to those it leaves out. α that are no numbers, or not within ±1e6, raise
        `AlphaError`.
        """
        before = self._rows
        try:
            self.set_alpha(value)
            yield self
        finally:
            self._apply({name: rows for name, rows in before.items() if name in self._attached})

    def set_alpha(self, value: Alpha | Mapping[str, Alpha]) -> None:
        """Steer at `value` until the next call; see `alpha` for what it may be."""
        rows = {name: _rows(alpha, name) for name, alpha in self._by_name(value).items()}
        lengths = {len(row) for row in rows.values()} - {1}
        if len(lengths) > 1:
            raise AlphaError(f"The adapters were given α for different batch sizes {sorted(lengths)}; use one size.")
        self._apply({name: row for name, row in rows.items() if any(row)})

    def phase_cache_info(self) -> dict[str, Any]:
        """Hits, misses, size and capacity of each adapter's phase cache, by adapter name."""
        return {name: attached.phases.cache_info() for name, attached in list(self._attached.items())}

    def steered_modules(self) -> set[nn.Module]:
        """The modules that any attached adapter changes."""
        return {self.model.get_submodule(name) for name in self._hooks}

    def first_steered_layer(self, layers: Sequence[nn.Module]) -> int:
        """Index of the first of `layers` that any attached adapter changes; len(layers) if none does."""
        steered = self.steered_modules()
        return next((i for i, layer in enumerate(layers) if not steered.isdisjoint(layer.modules())), len(layers))

    def _by_name(self, value: Alpha | Mapping[str, Alpha]) -> Mapping[str, Alpha]:
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - set(self._attached))
            if unknown:
                raise AlphaError(f"No adapter named {unknown[0]!r} is attached; attached are {sorted(self._attached)}.")
            return value
        if len(self._attached) != 1:
            raise AlphaError(f"Name the adapter α is for, as in {{name: α}}; attached are {sorted(self._attached)}.")
        return dict.fromkeys(self._attached, value)

    def _forget(self) -> None:
        """Drop what was prepared for adapters that may be gone."""
        self._batches = lru_cache(maxsize=BATCHES_CACHED)(self._batch_of)
        self._stacks = lru_cache(maxsize=STACKS_CACHED)(self._stacks_of)

    def _apply(self, rows: dict[str, Rows]) -> None:
        self._rows = rows
        large = max(map(len, rows.values()), default=0) > ROWS_CACHED
        self._now = (self._batch_of if large else self._batches)(tuple(sorted(rows.items()))) if rows else {}

    def _batch_of(self, rows: tuple[tuple[str, Rows], ...]) -> dict[str, list[Application]]:
        """What every module adds when the rows of a batch have these α."""
        phases = {name: self._attached[name].batch(alphas) for name, alphas in rows}
        stacks = self._stacks(tuple(phases))
        return {
            module: [(delta, _side_by_side([phases[name][module] for name in names])) for names, delta in parts]
            for module, parts in stacks.items()
        }

    def _stacks_of(self, names: tuple[str, ...]) -> dict[str, list[tuple[tuple[str, ...], Addend]]]:
        """Per module the adapters that can share one pair of products, and the others one by one."""
        stacks: dict[str, list[tuple[tuple[str, ...], Addend]]] = {}
        for module in self._hooks:
            here = {
                name: self._attached[name].deltas[module] for name in names if module in self._attached[name].deltas
            }
            folded: dict[int, dict[str, FoldedFactors]] = {}
            for name, delta in here.items():
                if isinstance(delta, FoldedDelta):
                    folded.setdefault(delta.factors.steps, {})[name] = delta.factors
            shared = [(tuple(group), FoldedFactors.side_by_side(list(group.values()))) for group in folded.values()]
            alone = [((name,), delta) for name, delta in here.items() if not isinstance(delta, FoldedDelta)]
            if here:
                stacks[module] = [*shared, *alone]
        return stacks

    def _hook(self, name: str) -> list[RemovableHandle]:
        rows = _RowsOf(self.model, name)

        def add_deltas(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            given = args[0] if args else next(iter(kwargs.values()))
            if output is given:
                return output  # a block that a run of some of the layers passes over (`server.engine.forward`)
            states, *others = output if isinstance(output, tuple) else (output,)  # blocks may give more than states
            for delta, coefficients in self._now.get(name, ()):
                x = rows.restored(given, alphas=coefficients[0].shape[0])
                states = delta.add(states.view(*x.shape[:2], -1), x, coefficients).view(states.shape)
            return (states, *others) if isinstance(output, tuple) else states

        return [*rows.hooks, self.model.get_submodule(name).register_forward_hook(add_deltas, with_kwargs=True)]


class _RowsOf:
    """Which tokens a module is given belong to which row of the batch.

    A mixture of experts hands the tokens of all rows to its shared expert as one list, in their order: the batch is
    seen where the mixture itself is called, two levels above the expert's linear layers.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._name = name
        self._batch: torch.Size | None = None  # (rows, tokens)
        outer = ".".join(name.split(".")[:-2])  # where it ends in a number, it is a block, and no mixture
        nested = outer and not outer[-1].isdigit() and hasattr(model.get_submodule(name), "in_features")
        seen = [model.get_submodule(outer)] if nested else []
        self.hooks = [each.register_forward_pre_hook(self._see, with_kwargs=True) for each in seen]

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs.get("hidden_states")
        self._batch = states.shape[:2] if isinstance(states, Tensor) and states.dim() == 3 else None

    def restored(self, x: Tensor, *, alphas: int) -> Tensor:
        """x (rows, tokens, d), for that many α, one or one per row."""
        if x.dim() == 2 and self._batch is not None and self._batch.numel() == len(x):
            x = x.reshape(*self._batch, -1)
        elif x.dim() == 2 and alphas > 1:
            raise AlphaError(
                f"{alphas} α are set, but {self._name} is given {len(x)} tokens without their rows; set one α for all."
            )
        elif x.dim() == 2:
            x = x[None]
        elif x.dim() != 3:
            raise AlphaError(f"{self._name} is given {tuple(x.shape)} and not (rows, tokens, width); steer elsewhere.")
        if alphas not in (1, x.shape[0]):
            raise AlphaError(f"{alphas} α are set for a batch of {x.shape[0]} rows; set one, or one per row.")
        return x


class _Attached:
    """One adapter on one model: its delta per module, and their phases per α."""

    def __init__(self, model: PreTrainedModel, adapter: AnyAdapter, cache_size: int) -> None:
        check_base(model, adapter)
        self.adapter = adapter
        self.deltas = {name: _delta(model, adapter, name) for name in adapter.modules}
        self.phases = lru_cache(maxsize=cache_size)(self._phases_of)
        self._groups = list(self._by_device().values())

    def _by_device(self) -> dict[torch.device, dict[str, list[int]]]:
        """The modules of every device that the model is spread over, and the sizes of their coefficients."""
        groups: dict[torch.device, dict[str, list[int]]] = {}
        for name, delta in self.deltas.items():
            parts = delta.coefficients(0.0)
            groups.setdefault(parts[0].device, {})[name] = [part.shape[-1] for part in parts]
        return groups

    def _phases_of(self, alpha: float) -> list[Coefficients]:
        """The coefficients of all modules of a device at one α, end to end: one copy in a batch, not one per module."""
        per_module = [[self.deltas[name].coefficients(alpha) for name in group] for group in self._groups]
        return [tuple(torch.cat(parts, dim=-1) for parts in zip(*group, strict=True)) for group in per_module]

    def batch(self, alphas: Rows) -> dict[str, Coefficients]:
        """Per module, the coefficients of every row, (rows, ...)."""
        found: dict[str, Coefficients] = {}
        for group, rows in zip(self._groups, zip(*map(self.phases, alphas), strict=True), strict=True):
            stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
            sizes = zip(*group.values(), strict=True)  # [part][module]
            split = [part.split(each, dim=-1) for part, each in zip(stacked, sizes, strict=True)]
            found |= zip(group, zip(*split, strict=True), strict=True)
        return found


def _delta(model: PreTrainedModel, adapter: AnyAdapter, name: str) -> PhaseDelta:
    if isinstance(adapter, Adapter):
        like = _reference(model, find_linear(model, name, adapter))
        return make_delta(adapter.config, adapter.modules[name], like)
    return VectorDelta(adapter.modules[name], _reference(model, find_added_to(model, name, adapter)))


def _side_by_side(coefficients: list[Coefficients]) -> Coefficients:
    """Coefficients for `FoldedFactors.side_by_side`; one α for all rows meets one per row by repetition."""
    if len(coefficients) == 1:
        return coefficients[0]
    rows = max(part.shape[0] for (part,) in coefficients)
    return (torch.cat([part.expand(rows, -1, -1) for (part,) in coefficients], dim=-1),)


def _rows(alpha: Alpha, name: str) -> Rows:
    values: Any = alpha.flatten().tolist() if isinstance(alpha, Tensor) else alpha
    rows = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    if not rows:
        raise AlphaError(f"α for {name!r} is an empty list; give a number or one per row.")
    for value in rows:
        if isinstance(value, bool) or not isinstance(value, Real) or value in (math.inf, -math.inf) or value != value:
            raise AlphaError(f"α {value!r} for {name!r} is not a finite number.")
        if not abs(cast(float, value)) < MAX_ALPHA:
            raise AlphaError(f"α for {name!r} is beyond ±{MAX_ALPHA:.0e}; nothing finite is left of a model there.")
    return tuple(float(value) for value in rows)


def _reference(model: PreTrainedModel, module: nn.Module) -> Tensor:
    """A tensor with the device and compute dtype of `module`, also where its weight is quantised."""
    weight = next(module.parameters())
    dtype = model.dtype if is_packed(weight) else weight.dtype
    return torch.empty(0, device=weight.device, dtype=dtype)
