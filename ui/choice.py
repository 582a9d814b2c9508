"""Draw what the model would choose: one bar per α, from the second choice on the left to the first on the right."""

from __future__ import annotations

import math
from html import escape

from .client import Score

STYLE = """
.choice-row {display: grid; grid-template-columns: 6em 1fr 19em; gap: .8em; align-items: center; margin: .35em 0;
  white-space: nowrap}
.choice-bar {position: relative; height: 1.3em; border-radius: .3em; background: var(--border-color-primary)}
.choice-bar > i {position: absolute; inset: 0 auto 0 0; border-radius: .3em; background: var(--color-accent)}
.choice-bar > b {position: absolute; left: 50%; top: -.15em; bottom: -.15em;
  border-left: 2px dotted var(--body-text-color)}
.choice-ends {display: flex; justify-content: space-between; font-size: .85em}
@media (max-width: 640px) {
  .choice-row {grid-template-columns: 5.5em 1fr}
  .choice-row > :last-child {grid-column: 1 / -1}
}
"""


def draw_choice(scores: list[Score], choices: list[str]) -> str:
    """HTML with log-odds in nats and the probability mass on the choices, per α."""
    first, second = (escape(choice) for choice in choices[:2])
    ends = (
        f'<div class="choice-row"><span></span><div class="choice-ends"><span>{second}</span>'
        f"<span>{first}</span></div><span></span></div>"
    )
    return ends + "".join(_row(score, first, second) for score in scores)


def _row(score: Score, first: str, second: str) -> str:
    share = 100 / (1 + math.exp(-max(-50.0, min(50.0, score.log_odds))))
    figures = f"log-odds {score.log_odds:+.2f} nats · choice mass {score.choice_mass:.1%}"
    alpha = f"{score.alpha:+.2f}" if score.alpha else "0"
    label = f"α {alpha}: log-odds of {first} against {second} {score.log_odds:+.2f} nats"
    return (
        f'<div class="choice-row"><strong>α = {alpha}</strong>'
        f'<div class="choice-bar" role="img" aria-label="{label}"><i style="width:{share:.1f}%"></i><b></b></div>'
        f"<span>{figures}</span></div>"
    )
