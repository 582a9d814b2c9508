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

from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Sampling, generate_ids
from ipissa.evaluate.steerer import Steerer
from ipissa.sequences import continuation_logprobs, pad_batch, target_logprobs

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
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
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
        logprobs = continuation_logprobs(steerer.dial.model, batch)
    return float(target_logprobs(logprobs, batch).sum())


@dataclass(frozen=True)
class Match:
    """The scale that brings a method's degradation nearest to what is wanted, and whether that is within 5 %."""

    scale: float
    equal: bool


def matching_scale(degradation_at: Callable[[float], float], wanted: float, *, start: float = 1.0) -> Match:
    """The scale s at which `degradation_at(s)` is `wanted`, tried from `start` on.

    Degradation grows about as the square of the scale, so s is multiplied by the square root of what is missing.
    """
    if wanted < NOTHING:
        return Match(1.0, degradation_at(1.0) < NOTHING)
    scale, found = start, degradation_at(start)
    best = (abs(found - wanted), scale)
    for _ in range(MAX_STEPS):
        if best[0] <= TOLERANCE * wanted:
            break
        step = (wanted / max(found, NOTHING)) ** 0.5
        scale = min(max(scale * min(max(step, 1 / 16), 16), SCALE_LIMITS[0]), SCALE_LIMITS[1])
        found = degradation_at(scale)
        best = min(best, (abs(found - wanted), scale))
    equal = best[0] <= TOLERANCE * wanted
    if not equal:
        logger.warning(
            "No scale brings this method's degradation within %.0f %% of %.4f nats per token; the nearest, %.3g, is "
            "used, so compare it by the figure of effect against degradation.",
            100 * TOLERANCE,
            wanted,
            best[1],
        )
    return Match(best[1], equal)


def _common_end(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two contexts share at their ends, short of a whole one."""
    shared = 0
    while shared < min(len(one), len(other)) - 1 and one[-1 - shared] == other[-1 - shared]:
        shared += 1
    return shared
