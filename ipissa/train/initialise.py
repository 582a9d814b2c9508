"""Give an adapter the singular triples that a selection rule chooses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ipissa.adapter.layer import InnerPissaLayer
from ipissa.adapter.model import RESIDUAL_WRITERS
from ipissa.data.activations import pair_activations
from ipissa.data.pairs import ContrastivePair
from ipissa.train.selection import TripleStatistics, select


def select_triples(
    peft_model: Any,
    tokenizer: Any,
    pairs: Sequence[ContrastivePair],
    *,
    rule: str,
    seed: int = 0,
    adapter_name: str = "default",
) -> None:
    """Give every adapted layer the triples that `rule` chooses on the pairs, in place, before training.

    Args:
        seed: Of the rule `random`.
    """
    layers = {name: module for name, module in peft_model.named_modules() if isinstance(module, InnerPissaLayer)}
    with peft_model.disable_adapter():
        found = pair_activations(peft_model, tokenizer, pairs, {n: layer.base_linear() for n, layer in layers.items()})
    for name, layer in layers.items():
        u, s, v = (factor.float().cpu() for factor in layer.svd())
        block = int(re.findall(r"\.(\d+)\.", name)[-1])
        own = found.inputs[name] @ v
        writes = name.endswith(tuple(RESIDUAL_WRITERS))
        stream = found.stream[block + 1] @ u if writes else found.stream[block] @ v
        statistics = TripleStatistics(name, s, own[0], own[1], stream[0], stream[1], seed)
        layer.keep_triples(adapter_name, select(rule, statistics, layer.innerpissa_S[adapter_name].numel()))
