"""Before training: do the personas change what the model says at all?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import mean
from typing import Any

from ipissa.data.chat import chat_ids
from ipissa.data.items import CHOICES, PREFIX, Item
from ipissa.data.personas import Trait
from ipissa.evaluate.scoring import find_choices, score_choices

logger = logging.getLogger(__name__)
MIN_LOG_ODDS = 0.1  # nats between the personas' answers


@dataclass(frozen=True)
class Elicitation:
    """Log-odds of Yes against No in nats, averaged over small dilemmas, under each persona and without.

    `span` is how far the two personas are apart in a dilemma, averaged without its sign: the right answer is Yes in
    some of them and No in others, so that the averages of personas that change every answer may still be equal.
    """

    positive: float
    neutral: float
    plain: float
    negative: float
    span: float


def elicitation(model: Any, tokenizer: Any, trait: Trait) -> Elicitation:
    """Ask the base model under every persona, and warn if the answers hardly differ."""
    text = files("ipissa.data").joinpath("dilemmas.txt").read_text(encoding="utf-8")
    dilemmas = [[part.strip() for part in line.split("|")] for line in text.splitlines()]
    questions = [Item("", 1, situation, action, labels={}).question() for situation, action in dilemmas]
    odds = {
        name: _log_odds(model, tokenizer, [trait.messages(question, pole) for question in questions])
        for name, pole in (("positive", 1), ("neutral", 0), ("plain", None), ("negative", -1))
    }
    apart = [abs(p - n) for p, n in zip(odds["positive"], odds["negative"], strict=True)]
    result = Elicitation(**{name: mean(values) for name, values in odds.items()}, span=mean(apart))
    if result.span < MIN_LOG_ODDS:
        logger.warning(
            "The personas %r and %r hardly change this model's Yes/No answers (their log-odds are %.2f nats apart); "
            "the trait may still show in free text, but expect a weak adapter, or choose stronger words.",
            trait.positive,
            trait.negative,
            result.span,
        )
    return result


def _log_odds(model: Any, tokenizer: Any, chats: Sequence[Any]) -> list[float]:
    choices = find_choices(tokenizer, CHOICES)
    odds = []
    for messages in chats:
        yes, no = score_choices(model, tokenizer, chat_ids(tokenizer, messages, prefill=PREFIX), choices, rows=1)[0]
        odds.append(float(yes - no))
    return odds
