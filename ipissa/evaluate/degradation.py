"""What steering costs: how much less likely text that the unsteered model writes and reads becomes.

text    mean over tokens of KL(p(. | α = 0) || p(. | α)), on answers that the model gave unsteered: the nats
        per token that its own text loses, averaged over what it might have written. Never negative, and 0
        only where nothing changed.
prompt  mean negative log-likelihood per token of the question itself at α, less that at 0: the published one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Sampling, generate_ids
from ipissa.evaluate.steerer import Steerer
from ipissa.sequences import PaddedBatch, continuation_logprobs, pad_batch, target_logprobs

logger = logging.getLogger(__name__)

ROWS_PER_BATCH = 16
TOLERANCE = 0.05  # of the degradation that scales are matched to
MAX_STEPS = 12
SCALE_LIMITS = (2.0**-10, 2.0**10)
NOTHING = 1e-6  # nats; less than rounding does


@dataclass(frozen=True)
class PlainText:
    """What the unsteered model answered to a prompt, untold."""

    prompt: str
    tokens: list[int]


def sample_plain(model: Any, tokenizer: Any, prompts: Sequence[str], *, seed: int) -> list[PlainText]:
    """One answer per prompt, from the whole distribution."""
    contexts = [chat_ids(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        answers = generate_ids(model, tokenizer, contexts, **Sampling.whole().settings())
    return [PlainText(prompt, tokens) for prompt, tokens in zip(prompts, answers, strict=True)]


def text_degradation(steerer: Steerer, tokenizer: Any, texts: Sequence[PlainText], alpha: float) -> float:
    """Nats per token that unsteered answers lose at α."""

    def lost(batch_texts: Sequence[PlainText]) -> tuple[Tensor, Tensor]:
        prompts, tokens = [text.prompt for text in batch_texts], [text.tokens for text in batch_texts]
        base, batch = _read(steerer, tokenizer, prompts, tokens, 0.0)
        steered, _ = _read(steerer, tokenizer, prompts, tokens, alpha)
        divergence = torch.where(base.isfinite(), base.exp() * (base - steered), 0).sum(-1)  # (texts, tokens)
        return (divergence * batch.mask).sum(), batch.mask.sum()

    return _mean(texts, lost)


def prompt_degradation(
    steerer: Steerer, tokenizer: Any, questions: Sequence[str], alpha: float, prefill: str = ""
) -> float:
    """Nats per token that questions lose at α, over the tokens that end the chat at α and at 0 alike."""

    def lost(batch_questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        plain = steerer.contexts(tokenizer, batch_questions, 0.0, prefill)
        asked = steerer.contexts(tokenizer, batch_questions, alpha, prefill)
        shared = [_common_end(one, other) for one, other in zip(plain, asked, strict=True)]
        total = torch.zeros(())
        for contexts, at, sign in ((asked, alpha, 1), (plain, 0.0, -1)):
            batch = pad_batch(
                [context[:-k] for context, k in zip(contexts, shared, strict=True)],
                [context[-k:] for context, k in zip(contexts, shared, strict=True)],
                pad_id=tokenizer.pad_token_id,
                device=steerer.dial.model.device,
            )
            with torch.no_grad(), steerer.dial.alpha(steerer.turned(at)):
                logprobs = continuation_logprobs(steerer.dial.model, batch)
            total = total - sign * target_logprobs(logprobs, batch).sum().cpu()
        return total, torch.tensor(sum(shared))

    return _mean(questions, lost)


def matching_scale(degradation_at: Callable[[float], float], wanted: float) -> float:
    """The scale s at which `degradation_at(s)` is `wanted`, within 5 per cent where that is possible.

    Degradation grows about as the square of the scale, so s is multiplied by the square root of what is missing.
    """
    if wanted < NOTHING:
        return 1.0
    scale, found = 1.0, degradation_at(1.0)
    best = (abs(found - wanted), scale)
    for _ in range(MAX_STEPS):
        if best[0] <= TOLERANCE * wanted:
            break
        step = (wanted / max(found, NOTHING)) ** 0.5
        scale = min(max(scale * min(max(step, 1 / 16), 16), SCALE_LIMITS[0]), SCALE_LIMITS[1])
        found = degradation_at(scale)
        best = min(best, (abs(found - wanted), scale))
    if best[0] > TOLERANCE * wanted:
        logger.warning(
            "No scale brings this method's degradation within %.0f %% of %.4f nats per token; the nearest, %.3g, is "
            "used, so compare it by the figure of effect against degradation.",
            100 * TOLERANCE,
            wanted,
            best[1],
        )
    return best[1]


def _read(
    steerer: Steerer, tokenizer: Any, prompts: Sequence[str], answers: Sequence[list[int]], alpha: float
) -> tuple[Tensor, PaddedBatch]:
    contexts = steerer.contexts(tokenizer, prompts, alpha)
    batch = pad_batch(contexts, answers, pad_id=tokenizer.pad_token_id, device=steerer.dial.model.device)
    with torch.no_grad(), steerer.dial.alpha(steerer.turned(alpha)):
        return continuation_logprobs(steerer.dial.model, batch), batch


def _mean(things: Sequence[Any], sums: Callable[[Sequence[Any]], tuple[Tensor, Tensor]]) -> float:
    parts = [sums(things[start : start + ROWS_PER_BATCH]) for start in range(0, len(things), ROWS_PER_BATCH)]
    return float(sum(float(total) for total, _ in parts) / sum(float(count) for _, count in parts))


def _common_end(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two contexts share at their ends, short of a whole one."""
    shared = 0
    while shared < min(len(one), len(other)) - 1 and one[-1 - shared] == other[-1 - shared]:
        shared += 1
    return shared
