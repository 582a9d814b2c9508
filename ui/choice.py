"""The choice as it is now: one bar per setting, from the second choice on the left to the first on the right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .client import Score


def draw_choice(scores: Sequence[tuple[str, Score]], choices: Sequence[str]) -> str:
    """HTML with probabilities, log-odds in nats and choice mass, for every (name of a setting, score)."""
    first, second = (escape(choice) for choice in choices[:2])
    ends = f'<div class="choice-ends"><span>{second}</span><span>{first}</span></div>'
    return f'<div class="choice">{ends}{"".join(_row(name, score, choices) for name, score in scores)}</div>'


def _row(name: str, score: Score, choices: Sequence[str]) -> str:
    share = 100 / (1 + math.exp(-max(-50.0, min(50.0, score.log_odds))))
    figures = " · ".join(
        [
            f"log-odds <b>{score.log_odds:+.2f}</b> nats",
            *(f"{escape(choice)} {math.exp(score.logprobs[choice]):.1%}" for choice in choices),
            f"choice mass {score.choice_mass:.1%}",
        ]
    )
    first, second = (escape(choice) for choice in choices[:2])
    label = f"{escape(name)}: log-odds of {first} against {second} {score.log_odds:+.2f} nats"
    return (
        f'<div class="choice-row"><div class="choice-name">{escape(name)}</div>'
        f'<div class="choice-bar" role="img" aria-label="{label}"><i style="width:{share:.1f}%"></i><b></b></div>'
        f'<div class="choice-figures">{figures}</div></div>'
    )
