"""Before training: do the personas change what the model says at all?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ipissa.data.chat import chat_ids
from ipissa.data.personas import Trait
from ipissa.errors import TrainingError
from ipissa.evaluate.scoring import find_choices, score_choices
from ipissa.train.objectives.distill import Target

logger = logging.getLogger(__name__)
QUESTION = 'Situation: {situation}\nAction: {action}\nWould you do this? Answer "My choice: Yes" or "My choice: No".'
PREFIX = "My choice:"
MIN_LOG_ODDS = 0.1  # nats between the personas' answers
MIN_STRENGTH = 0.002  # nats per token that a persona must move the prediction of its own texts


@dataclass(frozen=True)
class Elicitation:
    """Log-odds of Yes against No in nats, averaged over small dilemmas, under each persona and without."""

    positive: float
    neutral: float
    plain: float
    negative: float

    @property
    def span(self) -> float:
        """Between the two personas."""
        return abs(self.positive - self.negative)


def elicitation(model: Any, tokenizer: Any, trait: Trait) -> Elicitation:
    """Ask the base model under every persona, and warn if the answers hardly differ."""
    text = files("ipissa.data").joinpath("dilemmas.txt").read_text(encoding="utf-8")
    questions = [
        QUESTION.format(situation=s.strip(), action=a.strip()) for s, a in (x.split("|") for x in text.splitlines())
    ]
    found = {
        name: _mean_log_odds(model, tokenizer, [trait.messages(question, pole) for question in questions])
        for name, pole in (("positive", 1), ("neutral", 0), ("plain", None), ("negative", -1))
    }
    result = Elicitation(**found)
    if result.span < MIN_LOG_ODDS:
        logger.warning(
            "The personas %r and %r hardly change this model's Yes/No answers (log-odds %.2f and %.2f nats); "
            "the trait may still show in free text, but expect a weak adapter, or choose stronger words.",
            trait.positive,
            trait.negative,
            result.positive,
            result.negative,
        )
    return result


def check_targets(targets: Sequence[Target], trait: Trait) -> dict[int, float]:
    """Nats per token by which each persona moves the prediction of its own texts, by pole.

    Raises:
        TrainingError: a persona moves nothing, so there is nothing to learn.
    """
    strengths = {}
    for pole in (1, -1):
        own = [target.untrained for target in targets if target.pole == pole]
        strengths[pole] = sum(own) / len(own)
        if strengths[pole] < MIN_STRENGTH:
            raise TrainingError(
                f"Told to be {trait.persona(pole)} person, this model says nearly what it says untold "
                f"({strengths[pole]:.4f} nats per token); choose stronger words, other --prompts or a larger model."
            )
    return strengths


def _mean_log_odds(model: Any, tokenizer: Any, chats: Sequence[Any]) -> float:
    choices = find_choices(tokenizer, ["Yes", "No"])
    odds = []
    for messages in chats:
        yes, no = score_choices(model, tokenizer, chat_ids(tokenizer, messages, prefill=PREFIX), choices, rows=1)[0]
        odds.append(float(yes - no))
    return sum(odds) / len(odds)
