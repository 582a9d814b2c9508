"""Keys and values of the running sequences, one slot each, and the attention that reads them.

A slot is one row of every layer's key and value tensors, (slots, heads, length, dim). Sequences start
at position 0 of their slot whatever their length, so they join and leave between steps without moving
each other; what lies behind a sequence's own length is masked and overwritten later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ipissa.errors import ConfigError

ATTENTION = "ipissa_slots"  # the name transformers models find `slot_attention` by
NOT_COMPUTED = ("s_aux", "softcap", "position_bias")  # what transformers' models hand to attention besides
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
LENGTH_STEP = 128  # lengths grow by whole steps, so that growing is rare


class SlotCache:
    """The key and value tensors of all layers; grows as needed, within a bound on slots x length.

    Args:
        max_tokens: Most positions over all slots. All slots are as long as the longest sequence.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._slots = 0
        self._length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def layers(self) -> int:
        """How many layers have stored anything."""
        return len(self._layers)

    def fits(self, slots: int, length: int) -> bool:
        """Whether so many sequences of so many positions stay within the bound."""
        return slots * length <= self.max_tokens

    def reserve(self, slots: int, length: int) -> None:
        """Make room for the sequences in the first `slots` slots, of at most `length` positions.

        What is stored in them stays. Room left from busier times stays too, unless it would break the
        bound, which `fits` promises for what is asked here.
        """
        if slots <= self._slots and length <= self._length:
            return
        wide, long = max(self._slots, slots), max(self._length, -(-length // LENGTH_STEP) * LENGTH_STEP)
        if wide * long > self.max_tokens:
            wide, long = slots, max(length, min(long, self.max_tokens // slots))
        for index, (keys, values) in self._layers.items():  # one by one: old and new need not all exist at once
            self._layers[index] = (_resized(keys, wide, long), _resized(values, wide, long))
        self._slots, self._length = wide, long

    def release(self) -> None:
        """Give all memory back; for when no sequence is left."""
        self._slots = self._length = 0
        self._layers = {}

    def swap(self, a: int, b: int) -> None:
        """Exchange the contents of two slots."""
        for tensors in self._layers.values():
            for tensor in tensors:
                tensor[[a, b]] = tensor[[b, a]]

    def copy(self, source: int, target: int) -> None:
        """Overwrite one slot with another."""
        for tensors in self._layers.values():
            for tensor in tensors:
                tensor[target].copy_(tensor[source])

    def clear(self, slot: int) -> None:
        """Forget what is in a slot; even masked, what is not finite would reach who comes next (0 x NaN = NaN)."""
        for tensors in self._layers.values():
            for tensor in tensors:
                tensor[slot].zero_()

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, (slots, heads, length, dim); `like` (batch, heads, tokens, dim)."""
        if index not in self._layers:
            empty = like.new_zeros(0, like.shape[1], 0, like.shape[3])
            self._layers[index] = (
                _resized(empty, self._slots, self._length),
                _resized(empty, self._slots, self._length),
            )
        return self._layers[index]


def _resized(old: Tensor, slots: int, length: int) -> Tensor:
    new = old.new_zeros(slots, old.shape[1], length, old.shape[3])
    kept = (min(slots, old.shape[0]), min(length, old.shape[2]))
    new[: kept[0], :, : kept[1]] = old[: kept[0], :, : kept[1]]
    return new


@dataclass
class SlotView:
    """What one model call reads and writes.

    Every batch row is read from one slot and written to one or more: rows that were computed once for
    several sequences are written to the slots of all of them.
    """

    cache: SlotCache
    positions: Tensor  # (batch, tokens) where in its sequence each token is
    read: Tensor | slice  # the slot of each batch row
    write: Tensor  # (writes,) slots
    source: Tensor | None  # (writes,) the batch row each write takes; None: the rows themselves, in order
    length: int  # positions read: one more than the last that is written
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def exchange(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer, (batch, heads, tokens, dim), and return all up to `length`."""
        stored = self.cache.layer(index, keys)
        positions = self.positions if self.source is None else self.positions[self.source]
        for tensor, new in zip(stored, (keys, values), strict=True):
            rows = new if self.source is None else new[self.source]
            tensor[self.write[:, None], :, positions] = rows.transpose(1, 2)
        return stored[0][self.read, :, : self.length], stored[1][self.read, :, : self.length]

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """0 where a token may look and -inf elsewhere, (batch, 1, groups x tokens, length), equal in all groups.

        Layers of one kind share it.
        """
        if (window, groups) not in self._masks:
            mask = additive_mask(self.positions, self.length, window, dtype)
            self._masks[window, groups] = mask.repeat(1, 1, groups, 1)
        return self._masks[window, groups]


def additive_mask(positions: Tensor, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Causal mask, over the last `window` positions if given; positions (batch, tokens)."""
    keys = torch.arange(length, device=positions.device)
    here = positions[:, None, :, None]
    hidden = keys > here
    if window is not None:
        hidden |= keys <= here - window
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    slots: SlotView | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it; query (batch, heads, tokens, dim).

    With `slots` the keys and values go through the cache. Without, the call is one whole causal pass
    over rows that are padded on the right, which causality alone keeps out of sight.

    Query heads that share a key head become further query rows of it, so keys are read once and never
    repeated in memory.

    Raises:
        ConfigError: the layer asks for what is not computed here.
    """
    if asked := [name for name in NOT_COMPUTED if more.get(name) is not None]:
        raise ConfigError(f"This model's attention has {asked[0]}, which the torch engine does not do.")
    batch, heads, tokens, dim = query.shape
    if slots is None:
        mask = None
        if sliding_window is not None and tokens > sliding_window:
            mask = additive_mask(torch.arange(tokens, device=query.device)[None], tokens, sliding_window, query.dtype)
        grouped = query
    else:
        key, value = slots.exchange(int(module.layer_idx), key, value)  # type: ignore[arg-type]
        groups = heads // key.shape[1]
        mask = slots.mask(sliding_window, groups, query.dtype)
        grouped = query.reshape(batch, key.shape[1], groups * tokens, dim)
    output = nn.functional.scaled_dot_product_attention(
        grouped,
        key,
        value,
        attn_mask=mask,
        scale=scaling,
        is_causal=slots is None and mask is None and tokens > 1,
        enable_gqa=grouped.shape[1] != key.shape[1],
    )
    return output.reshape(batch, heads, tokens, dim).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, slot_attention)


def check_attention(config: Any, layers: Iterable[nn.Module] = ()) -> None:
    """Refuse models whose attention does more than `slot_attention` computes.

    Raises:
        ConfigError: the model caps attention scores, has attention sinks, layers without attention, or positions
            whose meaning depends on the longest text in the batch.
    """
    if any(hasattr(module, "sinks") for layer in layers for module in layer.modules()):
        raise ConfigError("This model has attention sinks (gpt-oss), which the torch engine does not compute.")
    if getattr(config, "attn_logit_softcapping", None):
        raise ConfigError("This model caps its attention scores (Gemma 2), which the torch engine does not do.")
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
    if other := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise ConfigError(f"This model has {other[0]} layers, which the torch engine does not run.")
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(each for each in rope.values() if isinstance(each, dict))):
        if (kind := parameters.get("rope_type")) in BATCH_DEPENDENT_ROPE:
            raise ConfigError(
                f"This model has {kind} positions, with which texts in one batch would change each other; "
                "the torch engine does not run it."
            )
