"""Whether a model says through slots and split layers what it says by itself, tried on a few tokens.

Models differ in what their attention is called with, and in what their layers read besides hidden states, and their
configurations do not tell. What does not fit is no error but wrong text, so every model is tried as it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ipissa.errors import IpissaError

from .cache import SlotCache, SlotView
from .forward import StagedModel

TOKENS, TOLD = 6, 3  # of the text, and of those the last, after which logits are compared
# By how much of their own size logits may be off: rounding explains 1e-5, and in 16 or fewer bits some per cent.
# Those of a model that does not see its context are off by about 1.
EXACT, ROUNDED = 0.01, 0.25


class Rehearsal:
    """A short text, and what the model says about it by itself.

    Args:
        model: As it comes, before it is staged.
    """

    def __init__(self, model: Any) -> None:
        self._tolerance = EXACT if model.dtype == torch.float32 else ROUNDED
        step = model.get_input_embeddings().num_embeddings // (TOKENS + 1)
        self._ids = step * torch.arange(1, TOKENS + 1, device=model.device)[None]
        with torch.no_grad():
            self._expected = model(input_ids=self._ids, use_cache=False).logits[0, -TOLD:].float()
        self._faults: dict[int, str | None] = {}

    def fault(self, staged: StagedModel, layer: int) -> str | None:
        """What goes wrong where the layers from `layer` on run apart from those before; None if nothing does."""
        if layer not in self._faults:
            try:
                self._faults[layer] = self._find_fault(staged, layer)
            except (IpissaError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # which another time may not come
                first = str(error).strip().partition("\n")[0].rstrip(".")
                return f"{type(error).__name__}: {first}"
        return self._faults[layer]

    def _find_fault(self, staged: StagedModel, layer: int) -> str | None:
        if self._expected.isnan().any():
            return None  # there is nothing to compare with, and every request will be told so
        cache = SlotCache(TOLD * TOKENS)
        for logits in self._logits(staged, layer, cache):
            off = self._difference(logits)
            if not off <= self._tolerance:  # NaN is off, too
                return f"through slots and split layers its logits are off by {off:.0%}"
        if cache.layers != staged.depth:
            return f"{staged.depth - cache.layers} of its {staged.depth} layers keep nothing in slots"
        return None

    def _logits(self, staged: StagedModel, layer: int, cache: SlotCache) -> Iterator[Tensor]:
        """As scores are made, as prompts are read, and as answers are written; each (told, vocab).

        The text is one row below `layer`. Above, and in slots, it is one for each token told, which that row reads
        once more at the end.
        """
        positions = torch.arange(TOKENS, device=self._ids.device)[None]
        rows, told = positions[0, :TOLD], positions[0, -TOLD:]
        repeated = torch.zeros_like(rows)
        above = positions.expand(TOLD, -1)
        hidden = staged.hidden_states(self._ids, positions, until_layer=layer)
        yield staged.logits(hidden[repeated], above, (rows, told))

        cache.reserve(TOLD, TOKENS)
        one = SlotView(cache, positions, rows[:1], rows, repeated, TOKENS)
        each = SlotView(cache, above, rows, rows, None, TOKENS)
        hidden = staged.hidden_states(self._ids, positions, slots=one, until_layer=layer)
        yield staged.logits(hidden[repeated], above, (rows, told), slots=each)

        last = SlotView(cache, told[:, None], slice(0, TOLD), rows, None, TOKENS)
        yield staged.logits(self._ids[0, told, None], told[:, None], (rows, repeated), slots=last)

    def _difference(self, found: Tensor) -> float:
        """How far logits are from the model's own; the median, as rounding may send one token to other experts."""
        size = (self._expected - self._expected.mean(-1, keepdim=True)).norm(dim=-1)
        return ((found - self._expected).norm(dim=-1) / size).median().item()
