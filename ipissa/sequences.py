"""Score given continuations of given contexts, in padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    return _logits(model, batch)[:, :-1].float().log_softmax(-1)


def target_logprobs(logprobs: Tensor, batch: PaddedBatch) -> Tensor:
    """log p of each continuation token, 0 where there is none; (batch, tokens)."""
    picked = logprobs.gather(-1, batch.targets[..., None])[..., 0]
    return picked * batch.mask


def continuation_target_logprobs(model: Any, batch: PaddedBatch) -> Tensor:
    """`target_logprobs` of `continuation_logprobs` in less memory, where nothing else is asked of the predictions."""
    return _TargetLogprobs.apply(_logits(model, batch), batch.targets) * batch.mask


def _logits(model: Any, batch: PaddedBatch) -> Tensor:
    """Before every continuation token and after the last, (batch, tokens + 1, vocab)."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.targets.shape[1] + 1,
        use_cache=False,
    ).logits


class _TargetLogprobs(torch.autograd.Function):
    """log p of every target from logits, (batch, tokens + 1, vocab) to (batch, tokens) float32.

    Of the size of the logits there are only they and their gradient, onehot(t) - softmax(logits); `log_softmax` and
    `gather` hold more such tensors at their peak, the largest of a step.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        normalisers = torch.stack([row[:-1].float().logsumexp(-1) for row in logits])
        ctx.save_for_backward(logits, normalisers, targets)
        return logits[:, :-1].gather(-1, targets[..., None])[..., 0].float() - normalisers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, normalisers, targets = ctx.saved_tensors
        (upstream,) = gradients
        found = torch.zeros_like(logits)
        for i, row in enumerate(logits):
            share = (row[:-1].float() - normalisers[i, :, None]).exp_().mul_(-upstream[i, :, None])
            found[i, :-1] = share.scatter_add_(-1, targets[i, :, None], upstream[i, :, None])
        return found, None
