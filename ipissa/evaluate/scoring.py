"""What a model would choose: log-probabilities of given answers right after a prefix.

A choice is matched by its exact text, spaces and case aside: for "No" the tokens " No", "No", " no",
"NO" ... count and "Not" or "Now" do not. A choice without any single-token form is scored as a token
sequence instead, with and without a leading space.

`/v1/score` and `ipissa eval` find choices by the same function; the server brings its own batching, and a test compares
what the two make of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ipissa.errors import ConfigError
from ipissa.evaluate.dial import Dial
from ipissa.evaluate.shared_layers import rows_repeated
from ipissa.sequences import pad_batch

ROWS_PER_BATCH = 32


@dataclass(frozen=True)
class Choice:
    """One answer and the token sequences that spell it, all of length 1 where that is possible."""

    text: str
    variants: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChoiceScore:
    """The choices at one α; probabilities are natural logarithms."""

    logprobs: dict[str, float]
    log_odds: float  # first choice against second, in nats
    choice_mass: float  # summed probability of all choices


def find_choices(tokenizer: Any, texts: Sequence[str]) -> list[Choice]:
    """The token variants of each answer.

    Raises:
        ConfigError: fewer than two answers, an empty one, one without tokens, or two that are spelt alike.
    """
    if len(texts) < 2:
        raise ConfigError(f"choices {list(texts)} are fewer than two; give at least two answers.")
    spelt = [text.strip().lower() for text in texts]
    if not all(spelt):
        raise ConfigError("choices hold an empty answer; give each at least one character.")
    if len(set(spelt)) < len(spelt):
        raise ConfigError(f"choices {list(texts)} name one answer twice, spaces and case aside.")
    by_text = _single_tokens(tokenizer)
    return [
        Choice(text, by_text.get(key) or _sequences(tokenizer, text)) for text, key in zip(texts, spelt, strict=True)
    ]


@lru_cache(maxsize=8)
def _single_tokens(tokenizer: Any) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Every token by its text, spaces and case aside."""
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    special = set(tokenizer.all_special_ids)
    for token, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
        if token not in special and (key := text.strip().lower()):
            found[key] = (*found.get(key, ()), (token,))
    return found


def _sequences(tokenizer: Any, text: str) -> tuple[tuple[int, ...], ...]:
    forms = (" " + text.strip(), text.strip())
    spelt = dict.fromkeys(tuple(tokenizer.encode(form, add_special_tokens=False)) for form in forms)
    if not (spellings := tuple(filter(None, spelt))):
        raise ConfigError(f"The choice {text!r} is nothing to this model's tokenizer; give one that has tokens.")
    return spellings


@dataclass(frozen=True)
class NextTokens:
    """What is said after some contexts, in nats."""

    choices: Tensor  # (..., choices) log P(choice | context)
    likeliest: Tensor  # (...) log-probability of the likeliest next token


def score_choices(model: Any, tokenizer: Any, context: Sequence[int], choices: Sequence[Choice], rows: int) -> Tensor:
    """log P(choice | context) for each of `rows` equal rows, (rows, choices); steer the rows outside.

    The rows differ only by the α the caller has set on the model.
    """
    return next_tokens(model, tokenizer, [context] * rows, choices).choices


def score_contexts(
    dial: Dial,
    tokenizer: Any,
    contexts: Sequence[Sequence[int]],
    choices: Sequence[Choice],
    alphas: Sequence[float],
    *,
    rows_per_batch: int = ROWS_PER_BATCH,
) -> NextTokens:
    """Every context at every α; fields are (contexts, alphas, ...), in float32 on the CPU.

    Contexts of similar length share a batch, and all α of a context are in one batch, so that what comes
    before the first steered layer is computed once for all of them.
    """
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    per_batch = max(1, rows_per_batch // len(alphas))
    choice_parts, likeliest_parts = [], []
    for start in tqdm(range(0, len(order), per_batch), desc="choices", unit="batch"):
        batch = [contexts[i] for i in order[start : start + per_batch]]
        with dial.alpha(list(alphas) * len(batch)), rows_repeated(dial, len(alphas)) as repeat:
            found = next_tokens(dial.model, tokenizer, repeat(batch), choices)
        choice_parts.append(found.choices.unflatten(0, (len(batch), -1)).cpu())
        likeliest_parts.append(found.likeliest.unflatten(0, (len(batch), -1)).cpu())
    back = torch.tensor(order).argsort()
    return NextTokens(torch.cat(choice_parts)[back], torch.cat(likeliest_parts)[back])


@torch.no_grad()
def next_tokens(model: Any, tokenizer: Any, contexts: Sequence[Sequence[int]], choices: Sequence[Choice]) -> NextTokens:
    """One row per context, or more where the model repeats rows inside (`rows_repeated`)."""
    spellings = [variant for choice in choices for variant in choice.variants]
    longest = max(map(len, spellings))
    if longest == 1:
        logprobs = _next_logprobs(model, tokenizer, contexts, ())[:, -1]  # (rows, vocab)
        of = {variant: logprobs[:, variant[0]] for variant in spellings}
        first = logprobs
    else:
        of = {}
        for variant in spellings:
            logprobs = _next_logprobs(model, tokenizer, contexts, variant)  # (rows, tokens + 1, vocab)
            of[variant] = sum((logprobs[:, i, token] for i, token in enumerate(variant)), torch.tensor(0.0))
            first = logprobs[:, 0]
    summed = [torch.stack([of[variant] for variant in choice.variants]).logsumexp(0) for choice in choices]
    return NextTokens(torch.stack(summed, dim=-1), first.max(-1).values)


def _next_logprobs(
    model: Any, tokenizer: Any, contexts: Sequence[Sequence[int]], continuation: Sequence[int]
) -> Tensor:
    """log p after every context and after every token of the continuation, (rows, 1 + tokens, vocab)."""
    batch = pad_batch(contexts, [continuation] * len(contexts), pad_id=tokenizer.pad_token_id, device=model.device)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=1 + len(continuation),
        use_cache=False,
    ).logits
    return logits.float().log_softmax(-1)


def choice_scores(logprobs: Tensor, choices: Sequence[Choice]) -> list[ChoiceScore]:
    """Per row the figures users read; logprobs (rows, choices)."""
    return [
        ChoiceScore(
            logprobs={choice.text: value for choice, value in zip(choices, row, strict=True)},
            log_odds=row[0] - row[1],
            choice_mass=sum(torch.tensor(row).exp().tolist()),
        )
        for row in logprobs.tolist()
    ]
