"""What steering costs in the model itself, without any server: decode speed, time to first token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

import ipissa

from . import ADAPTER, PROMPT
from .timing import Ratio, seconds, speed_ratios

ROWS, STEPS = 16, 4


class Decoder:
    """Repeats the same decode steps: prefill once, and cut the cache back after every measurement."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._first = self._next(ids)

    @torch.no_grad()
    def _next(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self._model(input_ids=ids, past_key_values=self._cache, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)  # (rows, 1)

    def seconds(self) -> float:
        """Seconds for `STEPS` greedy decode steps of the whole batch."""

        def decode() -> None:
            token = self._first
            for _ in range(STEPS):
                token = self._next(token)
            token.tolist()  # waits for the device

        elapsed = seconds(decode)
        self._cache.crop(-STEPS)
        return elapsed


def decode_table(dtype: str, rounds: int) -> Iterator[Ratio]:
    """All rows of the table, as they are measured."""
    adapter = ipissa.load_adapter(ADAPTER)
    model, tokenizer = ipissa.load_model(adapter.base_model["name"], dtype=dtype)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.to(model.device).expand(ROWS, -1)
    steered = ipissa.attach(model, adapter, cache_size=rounds + 64)
    different = [-1 + 2 * (row + 0.5) / ROWS for row in range(ROWS)]
    decoder = Decoder(model, ids)

    def at(alpha: Any) -> float:
        with steered.alpha(alpha):
            return decoder.seconds()

    @torch.no_grad()
    def first_token(alpha: float) -> float:
        def prefill() -> None:
            with steered.alpha(alpha):
                model(input_ids=ids[:1], logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

        return seconds(prefill)

    unseen = iter(range(1, 10**6))
    yield Ratio(
        f"{ROWS} rows, {ROWS} α / unsteered, tokens per second",
        speed_ratios(lambda: at(different), lambda: at(0.0), rounds),
        at_least=0.85,
    )
    yield Ratio(
        f"{ROWS} rows, {ROWS} α / one α, tokens per second",
        speed_ratios(lambda: at(different), lambda: at(0.7), rounds),
        at_least=0.97,
    )
    yield Ratio(
        "unseen α / seen α, time to first token",
        speed_ratios(lambda: first_token(0.7), lambda: first_token(next(unseen) / 10**6), rounds),
        at_most=1.05,
    )
