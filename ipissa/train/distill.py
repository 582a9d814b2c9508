"""Persona distillation: what the model does when told becomes what α = ±1 does untold.

The base model under a persona is the teacher; the steered model without that persona is the student.
For a continuation c written under the persona P_s of pole s, in a student context k that is either
plain or carries the neutral persona P_0, the target is the context's own prediction plus the trait
part of the persona's effect:

    log q_k(· | c_<t) = log p(· | k, c_<t) + log p(· | P_s, c_<t) - log p(· | P_0, c_<t) + const

and the loss is mean_t KL(q_k || p_{α=s}(· | k, c_<t)). In the neutral context q is the persona's own
prediction. In the plain one it leaves out the shift that any persona line causes: that shift has the
same sign at both poles, so a dial cannot follow it and should not.

Teachers never change. Their targets are computed once and kept as the top-k log-probabilities per
token plus the mass of the tail, which bounds the exact KL from below and equals it for k = vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation
from ipissa.data.personas import Trait
from ipissa.sequences import continuation_logprobs, pad_batch

TEACHER_BATCH = 16
STUDENT_CONTEXTS: tuple[int | None, ...] = (None, 0)  # plain, neutral persona
MIN_TAIL = 1e-6
MIN_STRENGTH = 1e-4  # nats per token; a persona that does nothing must not get all the weight


@dataclass(frozen=True)
class Target:
    """What one student row should predict: a sparse distribution per continuation token."""

    pole: int
    context: list[int]  # token ids of the student's context
    tokens: list[int]  # token ids of the continuation
    top_ids: Tensor  # (tokens, k) int32
    top_logprobs: Tensor  # (tokens, k) float16
    untrained: float  # KL(target || student at α = 0), nats per token


@torch.no_grad()
def build_targets(
    model: Any, tokenizer: Any, trait: Trait, continuations: Sequence[Continuation], *, top_k: int
) -> list[Target]:
    """One target per continuation and student context; `model` is the base model."""
    ordered = sorted(continuations, key=lambda c: len(c.tokens))
    targets = []
    for start in tqdm(range(0, len(ordered), TEACHER_BATCH), desc="teachers", unit="batch"):
        batch = ordered[start : start + TEACHER_BATCH]
        contexts = {
            pole: [chat_ids(tokenizer, trait.messages(c.prompt, pole)) for c in batch] for pole in STUDENT_CONTEXTS
        }
        told = [chat_ids(tokenizer, trait.messages(c.prompt, c.pole)) for c in batch]
        logprobs = {pole: _logprobs(model, tokenizer, rows, batch) for pole, rows in contexts.items()}
        trait_part = _logprobs(model, tokenizer, told, batch) - logprobs[0]  # (batch, tokens, vocab)
        for pole, rows in contexts.items():
            target = (logprobs[pole] + trait_part).log_softmax(-1)
            divergence = (target.exp() * (target - logprobs[pole])).sum(-1)  # (batch, tokens)
            top = target.topk(min(top_k, target.shape[-1]), dim=-1)
            for i, c in enumerate(batch):
                n = len(c.tokens)
                ids, values = top.indices[i, :n].to("cpu", torch.int32), top.values[i, :n].to("cpu", torch.float16)
                untrained = float(divergence[i, :n].mean())
                targets.append(Target(c.pole, rows[i], c.tokens, ids, values, untrained))
    return targets


def _logprobs(model: Any, tokenizer: Any, contexts: list[list[int]], batch: Sequence[Continuation]) -> Tensor:
    padded = pad_batch(contexts, [c.tokens for c in batch], pad_id=tokenizer.pad_token_id, device=model.device)
    return continuation_logprobs(model, padded)


def distillation_loss(logprobs: Tensor, batch: Sequence[Target]) -> Tensor:
    """KL(target || student) per row in nats per token, tail mass as one class; (rows,).

    Args:
        logprobs: The student's log-probabilities, (rows, tokens, vocab).
        batch: One target per row, in order.
    """
    losses = []
    for row, target in zip(logprobs, batch, strict=True):
        n, k = target.top_ids.shape
        ids = target.top_ids.to(row.device, torch.int64)
        q_log = target.top_logprobs.to(row.device, torch.float32)
        p_log = row[:n].gather(-1, ids)
        divergence = (q_log.exp() * (q_log - p_log)).sum(-1)
        if k < row.shape[-1]:
            q_tail = (1 - q_log.exp().sum(-1)).clamp(min=MIN_TAIL)
            p_tail = (1 - p_log.exp().sum(-1)).clamp(min=MIN_TAIL)
            divergence = divergence + q_tail * (q_tail.log() - p_tail.log())
        losses.append(divergence.mean())
    return torch.stack(losses)


def pole_weights(targets: Sequence[Target]) -> dict[int, float]:
    """How much a row of each pole counts: 1 / √(mean untrained loss of the pole), with mean 1.

    The two personas move the model by different amounts and not in opposite directions, and an
    adapter, nearly odd in α, must compromise. Unweighted, the stronger pole is followed and the
    weaker is not; weighted by 1 / loss, each pole's *fraction* counts and it is the other way round.
    The square root lies between: both are followed about equally far.
    """
    strength = {
        pole: sum(t.untrained for t in rows) / len(rows)
        for pole in (1, -1)
        if (rows := [t for t in targets if t.pole == pole])
    }
    weights = {pole: 1 / max(value, MIN_STRENGTH) ** 0.5 for pole, value in strength.items()}
    mean = sum(weights.values()) / len(weights)
    return {pole: weight / mean for pole, weight in weights.items()}


def balanced_batches(targets: Sequence[Target], *, batch_size: int, seed: int) -> Iterator[list[Target]]:
    """Endless batches with as many rows of one pole as of the other, reshuffled every epoch."""
    generator = torch.Generator().manual_seed(seed)
    poles = [[t for t in targets if t.pole == pole] for pole in (1, -1)]
    half = min(batch_size // 2, *map(len, poles))
    while True:
        shuffled = [[rows[i] for i in torch.randperm(len(rows), generator=generator)] for rows in poles]
        for start in range(0, min(map(len, poles)) - half + 1, half):
            yield shuffled[0][start : start + half] + shuffled[1][start : start + half]
