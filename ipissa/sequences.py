"""Score given continuations of given contexts, in padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedBatch:
    """Contexts padded on the left, continuations on the right, so that all continuations start together."""

    input_ids: Tensor  # (batch, length)
    attention_mask: Tensor  # (batch, length)
    position_ids: Tensor  # (batch, length)
    targets: Tensor  # (batch, tokens) the continuations
    mask: Tensor  # (batch, tokens) True where a continuation has a token

    @classmethod
    def taken_from(cls, tensors: Mapping[str, Any]) -> PaddedBatch:
        """The batch whose fields stand, by name, among other tensors."""
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})


def pad_batch(
    contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, pad_id: int, device: torch.device
) -> PaddedBatch:
    """Lay out one batch; contexts and continuations are token ids, row by row."""
    left = max(map(len, contexts))
    right = max(map(len, continuations))
    ids = torch.full((len(contexts), left + right), pad_id)
    attention = torch.zeros_like(ids)
    for row, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        start, end = left - len(context), left + len(continuation)
        ids[row, start:end] = torch.tensor([*context, *continuation])
        attention[row, start:end] = 1
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    return PaddedBatch(
        input_ids=ids.to(device),
        attention_mask=attention.to(device),
        position_ids=positions.to(device),
        targets=ids[:, left:].to(device),
        mask=attention[:, left:].bool().to(device),
    )


def continuation_logprobs(model: Any, batch: PaddedBatch) -> Tensor:
    """log p(· | context, continuation so far) at every continuation token, (batch, tokens, vocab) float32."""
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.targets.shape[1] + 1,
        use_cache=False,
    ).logits
    return logits[:, :-1].float().log_softmax(-1)


def target_logprobs(logprobs: Tensor, batch: PaddedBatch) -> Tensor:
    """log p of each continuation token, 0 where there is none; (batch, tokens)."""
    picked = logprobs.gather(-1, batch.targets[..., None])[..., 0]
    return picked * batch.mask
