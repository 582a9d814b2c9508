"""Give an adapter the singular triples that a selection rule chooses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ipissa.adapter.layer import InnerPissaLayer
from ipissa.adapter.model import RESIDUAL_WRITERS
from ipissa.data.activations import pair_activations
from ipissa.data.pairs import ContrastivePair
from ipissa.errors import ConfigError
from ipissa.train.selection import TripleStatistics, select

# Names of the layers that write to the residual stream, in more families than are adapted by default.
WRITERS = (*RESIDUAL_WRITERS, "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "wo", "w2")


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
        stream = found.stream[block + 1] if name.endswith(WRITERS) else found.stream[block]
        side = u if name.endswith(WRITERS) else v
        if side.shape[0] != stream.shape[-1]:
            raise ConfigError(
                f"Selection rule {rule!r} compares what {name} reads with the residual stream, and it reads something "
                "else; use --selection learnt or top."
            )
        stream = stream @ side
        statistics = TripleStatistics(name, s, own[0], own[1], stream[0], stream[1], seed)
        layer.keep_triples(adapter_name, select(rule, statistics, layer.innerpissa_S[adapter_name].numel()))
