"""What measuring dilemmas at 7 α costs, against 7 plain forward passes over the same items at the same batch size.

One adapter adapts as shipped, one the last third of its modules only, so that more layers are shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

import ipissa
from ipissa.adapter import Adapter, load_innerpissa
from ipissa.data.chat import chat_ids
from ipissa.data.datasets import load_items
from ipissa.data.items import CHOICES, PREFIX
from ipissa.evaluate.scoring import find_choices, score_contexts
from ipissa.sequences import pad_batch

from .timing import Ratio, seconds, speed_ratios

ADAPTER = "adapters/honest.safetensors"
ALPHAS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
ITEMS = 200
ROWS = 28


def evaluation_table(dtype: str, rounds: int) -> Iterator[Ratio]:
    """Both ratios of times; below 1 is faster than plain passes."""
    model, tokenizer = ipissa.load_model(dtype=dtype)
    items = load_items().items
    questions = [items[i % len(items)].question() for i in range(ITEMS)]
    contexts = [chat_ids(tokenizer, [{"role": "user", "content": each}], PREFIX) for each in questions]
    choices = find_choices(tokenizer, CHOICES)
    whole = load_innerpissa(ADAPTER)
    for name, adapter in (("as shipped", whole), ("last third of its modules", _last_third(whole))):
        with _attached(model, adapter) as steered:
            values = speed_ratios(
                lambda: seconds(lambda: _plain_passes(model, tokenizer, contexts)),
                lambda steered=steered: seconds(
                    lambda: score_contexts(steered, tokenizer, contexts, choices, ALPHAS, rows_per_batch=ROWS)
                ),
                rounds,
            )
        yield Ratio(f"{ITEMS} items at {len(ALPHAS)} α / {len(ALPHAS)} plain passes, {name}", values, at_most=1.1)


def _plain_passes(model: Any, tokenizer: Any, contexts: list[list[int]]) -> None:
    ordered = sorted(contexts, key=len)
    for _ in ALPHAS:
        for start in range(0, len(ordered), ROWS):
            rows = ordered[start : start + ROWS]
            batch = pad_batch(rows, [()] * len(rows), pad_id=tokenizer.pad_token_id, device=model.device)
            with torch.no_grad():
                model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    position_ids=batch.position_ids,
                    logits_to_keep=1,
                    use_cache=False,
                )


def _last_third(adapter: Adapter) -> Adapter:
    names = tuple(adapter.modules)[2 * len(adapter.modules) // 3 :]
    modules = {name: adapter.modules[name] for name in names}
    return replace(adapter, modules=modules, config=replace(adapter.config, modules=names))


@contextmanager
def _attached(model: Any, adapter: Adapter) -> Iterator[Any]:
    steered = ipissa.attach(model, adapter)
    try:
        yield steered
    finally:
        steered.detach()
