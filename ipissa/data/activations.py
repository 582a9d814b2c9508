"""What the base model does on contrastive pairs, at the last token of every opening."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipissa.adapter.base_model import blocks_of
from ipissa.data.pairs import ContrastivePair
from ipissa.sequences import PaddedBatch, pad_batch

PAIRS_PER_BATCH = 16


@dataclass(frozen=True)
class PairActivations:
    """Last-token activations, chosen rows first.

    Args:
        inputs: What every module reads, by name, (2, pairs, d_in).
        stream: The residual stream before the first block and after each, (blocks + 1, 2, pairs, d).
    """

    inputs: dict[str, Tensor]
    stream: Tensor


@torch.no_grad()
def pair_activations(
    model: Any, tokenizer: Any, pairs: Sequence[ContrastivePair], modules: dict[str, nn.Module]
) -> PairActivations:
    """Run `model`, adapters disabled if it has any, over both sides of every pair; float32 on the CPU."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    streams: list[Tensor] = []
    for start in tqdm(range(0, len(pairs), PAIRS_PER_BATCH), desc="activations", unit="batch"):
        padded = pad_pairs(pairs[start : start + PAIRS_PER_BATCH], pad_id=tokenizer.pad_token_id, device=_device(model))
        last = padded.input_ids.shape[1] - padded.targets.shape[1] + padded.mask.sum(-1) - 1  # (rows,)
        with ExitStack() as hooks:
            for name, module in modules.items():
                hooks.enter_context(_recorded(module, last, inputs[name]))
            # transformers' last hidden states are those after the final norm, which is not the stream any more.
            after_the_last = hooks.enter_context(output_of(blocks_of(model)[-1]))
            output = model(
                input_ids=padded.input_ids,
                attention_mask=padded.attention_mask,
                position_ids=padded.position_ids,
                logits_to_keep=1,
                use_cache=False,
                output_hidden_states=True,
            )
        stream = [*output.hidden_states[:-1], *after_the_last]
        streams.append(torch.stack([_last_tokens(states, last) for states in stream]))
    return PairActivations(
        {name: torch.cat([_by_side(rows) for rows in found], dim=1) for name, found in inputs.items()},
        torch.cat([_by_side(rows, dim=1) for rows in streams], dim=2),
    )


def pad_pairs(pairs: Sequence[ContrastivePair], *, pad_id: int, device: torch.device, times: int = 1) -> PaddedBatch:
    """All chosen rows, then all rejected rows, and that so many times."""
    contexts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    openings = [pair.opening for pair in pairs]
    return pad_batch(contexts * times, openings * 2 * times, pad_id=pad_id, device=device)


@contextmanager
def output_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what a decoder layer gives out."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        yield seen
    finally:
        handle.remove()


def by_rows(states: Tensor, rows: int) -> Tensor:
    """(rows, length, d) also of what a mixture's shared expert is given: the tokens of all rows as one list."""
    return states if states.dim() > 2 else states.unflatten(0, (rows, -1))


@contextmanager
def _recorded(module: nn.Module, last: Tensor, into: list[Tensor]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, args: into.append(_last_tokens(args[0], last)))
    try:
        yield
    finally:
        handle.remove()


def _last_tokens(states: Tensor, last: Tensor) -> Tensor:
    states = by_rows(states, len(last))
    return states[torch.arange(len(last), device=states.device), last].float().cpu()


def _by_side(rows: Tensor, dim: int = 0) -> Tensor:
    """(.., 2 pairs, ..) -> (.., 2, pairs, ..)."""
    return rows.unflatten(dim, (2, -1))


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
