"""What a model would choose: log-probabilities of given answers right after a prefix.

A choice is matched by its exact text, spaces and case aside: for "No" the tokens " No", "No", " no",
"NO" ... count and "Not" or "Now" do not. A choice without any single-token form is scored as a token
sequence instead, with and without a leading space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ipissa.errors import ConfigError
from ipissa.sequences import continuation_logprobs, pad_batch, target_logprobs


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
        ConfigError: fewer than two answers, an empty one, or two that are spelt alike.
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
    return tuple(dict.fromkeys(tuple(tokenizer.encode(form, add_special_tokens=False)) for form in forms))


@torch.no_grad()
def score_choices(model: Any, tokenizer: Any, context: Sequence[int], choices: Sequence[Choice], rows: int) -> Tensor:
    """log P(choice | context) for each of `rows` equal rows, (rows, choices); steer the rows outside.

    The rows differ only by the α the caller has set on the model.
    """
    if all(len(variant) == 1 for choice in choices for variant in choice.variants):
        ids = torch.tensor([list(context)] * rows, device=model.device)
        logprobs = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1].float().log_softmax(-1)
        columns = [[variant[0] for variant in choice.variants] for choice in choices]
        return torch.stack([logprobs[:, column].logsumexp(-1) for column in columns], dim=-1)
    scores = []
    for choice in choices:
        variants = [_sequence_logprob(model, tokenizer, context, variant, rows) for variant in choice.variants]
        scores.append(torch.stack(variants).logsumexp(0))
    return torch.stack(scores, dim=-1)


def _sequence_logprob(model: Any, tokenizer: Any, context: Sequence[int], variant: Sequence[int], rows: int) -> Tensor:
    batch = pad_batch(
        [list(context)] * rows, [list(variant)] * rows, pad_id=tokenizer.pad_token_id, device=model.device
    )
    return target_logprobs(continuation_logprobs(model, batch), batch).sum(-1)


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
