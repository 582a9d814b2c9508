"""Keys and values of the running sequences, one slot each, and the attention that reads them.

A slot is one row of every layer's key and value tensors, (slots, heads, length, dim). Sequences start
at position 0 of their slot whatever their length, so they join and leave between steps without moving
each other; what lies behind a sequence's own length is masked and overwritten later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ipissa.errors import ConfigError

ATTENTION = "ipissa_slots"  # the name transformers models find `slot_attention` by
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

    def fits(self, slots: int, length: int) -> bool:
        """Whether so many sequences of so many positions stay within the bound."""
        return slots * length <= self.max_tokens

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` sequences of `length` positions; what is stored stays."""
        if slots <= self._slots and length <= self._length:
            return
        self._slots = max(self._slots, slots)
        self._length = max(self._length, -(-length // LENGTH_STEP) * LENGTH_STEP)
        self._layers = {index: (self._grown(k), self._grown(v)) for index, (k, v) in self._layers.items()}

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

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, (slots, heads, length, dim); `like` (batch, heads, tokens, dim)."""
        if index not in self._layers:
            empty = like.new_zeros(0, like.shape[1], 0, like.shape[3])
            self._layers[index] = (self._grown(empty), self._grown(empty))
        return self._layers[index]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self._slots, old.shape[1], self._length, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
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
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def exchange(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer, (batch, heads, tokens, dim), and return all up to `length`."""
        stored = self.cache.layer(index, keys)
        positions = self.positions if self.source is None else self.positions[self.source]
        for tensor, new in zip(stored, (keys, values), strict=True):
            rows = new if self.source is None else new[self.source]
            tensor[self.write[:, None], :, positions] = rows.transpose(1, 2)
        return stored[0][self.read, :, : self.length], stored[1][self.read, :, : self.length]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where a token may look and -inf elsewhere, (batch, 1, tokens, length)."""
        if window not in self._masks:
            self._masks[window] = additive_mask(self.positions, self.length, window, dtype)
        return self._masks[window]


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
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it; query (batch, heads, tokens, dim).

    With `slots` the keys and values go through the cache. Without, the call is one whole causal pass
    over rows that are padded on the right, which causality alone keeps out of sight.

    Query heads that share a key head become further query rows of it, so keys are read once and never
    repeated in memory.
    """
    batch, heads, tokens, dim = query.shape
    if slots is None:
        mask = None
        if sliding_window is not None and tokens > sliding_window:
            mask = additive_mask(torch.arange(tokens, device=query.device)[None], tokens, sliding_window, query.dtype)
        grouped = query
    else:
        key, value = slots.exchange(int(module.layer_idx), key, value)  # type: ignore[arg-type]
        mask = slots.mask(sliding_window, query.dtype)
        groups = heads // key.shape[1]
        grouped = query.reshape(batch, key.shape[1], groups * tokens, dim)
        if groups > 1:
            mask = mask[:, :, None].expand(-1, -1, groups, -1, -1).reshape(batch, 1, groups * tokens, slots.length)
    output = nn.functional.scaled_dot_product_attention(
        grouped,
        key,
        value,
        attn_mask=mask,
        scale=scaling,
        is_causal=slots is None and mask is None and tokens > 1,
        enable_gqa=grouped.shape[1] != key.shape[1],
    )
    return output.reshape(batch, heads, tokens, dim).transpose(1, 2), None


AttentionInterface.register(ATTENTION, slot_attention)


def check_attention(config: Any) -> None:
    """Refuse models whose attention does more than `slot_attention` computes.

    Raises:
        ConfigError: the model caps attention scores, or has layers without attention.
    """
    if getattr(config, "attn_logit_softcapping", None):
        raise ConfigError("This model caps its attention scores (Gemma 2), which the torch engine does not do.")
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
    if other := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise ConfigError(f"This model has {other[0]} layers, which the torch engine does not run.")
