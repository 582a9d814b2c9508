"""What steering costs: how much less likely text that the unsteered model writes and reads becomes.

text    mean over tokens of KL(p(. | α = 0) || p(. | α)), on answers that the model gave unsteered: the nats
        per token that its own text loses, averaged over what it might have written. Never negative, and 0
        only where nothing changed.
prompt  mean negative log-likelihood per token of the question itself at α, less that at 0: the published one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Sampling, generate_ids, seeded
from ipissa.evaluate.steerer import Steerer
from ipissa.sequences import continuation_logprobs, continuation_target_logprobs, pad_batch

logger = logging.getLogger(__name__)

ROWS_PER_BATCH = 24
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
    with seeded(model, seed):
        answers = generate_ids(model, tokenizer, contexts, **Sampling.whole().settings())
    return [PlainText(prompt, tokens) for prompt, tokens in zip(prompts, answers, strict=True)]


@torch.no_grad()
def text_degradation(
    steerer: Steerer, tokenizer: Any, texts: Sequence[PlainText], alphas: Sequence[float]
) -> dict[float, float]:
    """Nats per token that unsteered answers lose at every α; unsteered and steered they are read in one batch."""
    settings = [0.0, *alphas]
    lost, tokens = torch.zeros(len(alphas), dtype=torch.float64), 0
    per_batch = max(1, ROWS_PER_BATCH // len(settings))
    for start in range(0, len(texts), per_batch):
        some = texts[start : start + per_batch]
        contexts = [steerer.contexts(tokenizer, [text.prompt], alpha)[0] for text in some for alpha in settings]
        answers = [text.tokens for text in some for _ in settings]
        batch = pad_batch(contexts, answers, pad_id=tokenizer.pad_token_id, device=steerer.dial.model.device)
        with steerer.dial.alpha([steerer.turned(alpha) for _ in some for alpha in settings]):
            logprobs = continuation_logprobs(steerer.dial.model, batch).unflatten(0, (len(some), -1))
        base, steered = logprobs[:, :1], logprobs[:, 1:]  # (texts, alphas, tokens, vocab)
        divergence = torch.where(base.isfinite(), base.exp() * (base - steered), 0).sum(-1)
        mask = batch.mask.unflatten(0, (len(some), -1))[:, 1:]
        lost += (divergence * mask).sum((0, 2)).double().cpu()
        tokens += sum(len(text.tokens) for text in some)
    return dict(zip(alphas, (lost / tokens).tolist(), strict=True))


@torch.no_grad()
def prompt_degradation(
    steerer: Steerer, tokenizer: Any, questions: Sequence[str], alpha: float, prefill: str = ""
) -> float:
    """Nats per token that questions lose at α, over the tokens that end the chat at α and at 0 alike."""
    lost, tokens = 0.0, 0
    for start in range(0, len(questions), ROWS_PER_BATCH):
        some = questions[start : start + ROWS_PER_BATCH]
        plain = steerer.contexts(tokenizer, some, 0.0, prefill)
        asked = steerer.contexts(tokenizer, some, alpha, prefill)
        shared = [_common_end(one, other) for one, other in zip(plain, asked, strict=True)]
        lost += _end_likelihood(steerer, tokenizer, plain, shared, 0.0)
        lost -= _end_likelihood(steerer, tokenizer, asked, shared, alpha)
        tokens += sum(shared)
    return lost / tokens


def _end_likelihood(
    steerer: Steerer, tokenizer: Any, contexts: Sequence[list[int]], ends: Sequence[int], alpha: float
) -> float:
    """Log-likelihood of the last tokens of every context, summed."""
    batch = pad_batch(
        [context[:-k] for context, k in zip(contexts, ends, strict=True)],
        [context[-k:] for context, k in zip(contexts, ends, strict=True)],
        pad_id=tokenizer.pad_token_id,
        device=steerer.dial.model.device,
    )
    with steerer.dial.alpha(steerer.turned(alpha)):
        return float(continuation_target_logprobs(steerer.dial.model, batch).sum())


@dataclass(frozen=True)
class Match:
    """The scale that brings a method's degradation nearest to what is wanted, and whether that is within 5 %."""

    scale: float
    equal: bool


def matching_scale(degradation_at: Callable[[float], float], wanted: float, *, start: float = 1.0) -> Match:
    """The scale s at which `degradation_at(s)` is `wanted`, tried from `start` on.

    Degradation grows about as the square of the scale, until text falls apart and it grows much faster. So s is
    multiplied by the square root of what is missing until scales on both sides are known, and is then interpolated.
    """
    if wanted < NOTHING:
        return Match(1.0, degradation_at(1.0) < NOTHING)
    tried = {start: degradation_at(start)}

    def nearest() -> float:
        return min(tried, key=lambda scale: abs(tried[scale] - wanted))

    while len(tried) <= MAX_STEPS and abs(tried[nearest()] - wanted) > TOLERANCE * wanted:
        scale = _next_scale(tried, wanted, nearest())
        if scale in tried:
            break
        tried[scale] = degradation_at(scale)
    best = nearest()
    equal = abs(tried[best] - wanted) <= TOLERANCE * wanted
    if not equal:
        logger.warning(
            "No scale brings this method's degradation within %.0f %% of %.4f nats per token; the nearest, %.3g, is "
            "used, so compare it by the figure of effect against degradation.",
            100 * TOLERANCE,
            wanted,
            best,
        )
    return Match(best, equal)


def _next_scale(tried: Mapping[float, float], wanted: float, nearest: float) -> float:
    """Where to look next, after these scales and their degradations."""
    above = [scale for scale, found in tried.items() if found >= wanted]
    below = [scale for scale, found in tried.items() if found < wanted and scale < min(above, default=math.inf)]
    if not above or not below:
        step = (wanted / max(tried[nearest], NOTHING)) ** 0.5
        return min(max(nearest * min(max(step, 1 / 16), 16), SCALE_LIMITS[0]), SCALE_LIMITS[1])
    low, high = max(below), min(above)
    # As a power of the scale; never too near an end, which would creep along a curve that is no power.
    low_log, high_log = (math.log(max(tried[scale], NOTHING)) for scale in (low, high))
    part = min(max((math.log(wanted) - low_log) / (high_log - low_log), 0.1), 0.9)
    return low * (high / low) ** part


def _common_end(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two contexts share at their ends, short of a whole one."""
    shared = 0
    while shared < min(len(one), len(other)) - 1 and one[-1 - shared] == other[-1 - shared]:
        shared += 1
    return shared
