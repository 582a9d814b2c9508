"""The choice as it is now: one bar per setting, from the second choice on the left to the first on the right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .client import Score

NOT_KNOWN = "not known"  # where the server could not tell, as of a choice that has no probability


def draw_choice(scores: Sequence[tuple[str, Score]], choices: Sequence[str]) -> str:
    """HTML with probabilities, log-odds in nats and choice mass, for every (name of a setting, score)."""
    first, second = (escape(choice) for choice in choices[:2])
    ends = f'<div class="choice-ends"><span>{second}</span><span>{first}</span></div>'
    return f'<div class="choice">{ends}{"".join(_row(name, score, choices) for name, score in scores)}</div>'


def _row(name: str, score: Score, choices: Sequence[str]) -> str:
    odds = (NOT_KNOWN, "") if score.log_odds is None else (f"{score.log_odds:+.2f}", " nats")
    figures = " · ".join(
        [
            f"log-odds <b>{odds[0]}</b>{odds[1]}",
            *(f"{escape(choice)} {_probability(score.logprobs[choice])}" for choice in choices),
            f"choice mass {NOT_KNOWN if score.choice_mass is None else f'{score.choice_mass:.1%}'}",
        ]
    )
    first, second = (escape(choice) for choice in choices[:2])
    share = _share(score.log_odds)
    label = f"{escape(name)}: log-odds of {first} against {second} {odds[0]}{odds[1]}"
    return (
        f'<div class="choice-row"><div class="choice-name">{escape(name)}</div>'
        f'<div class="choice-bar" role="img" aria-label="{label}"><i style="width:{share:.1f}%"></i><b></b></div>'
        f'<div class="choice-figures">{figures}</div></div>'
    )


def _share(log_odds: float | None) -> float:
    """How much of the bar the first choice has, in percent; nothing where it is not known."""
    return 0.0 if log_odds is None else 100 / (1 + math.exp(-max(-50.0, min(50.0, log_odds))))


def _probability(logprob: float | None) -> str:
    return NOT_KNOWN if logprob is None else f"{math.exp(logprob):.1%}"
