"""An adapter beside other ways to steer, all on the same texts and dilemmas, at equal degradation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from ipissa.data.items import PREFIX, Dataset
from ipissa.data.prompts import spread
from ipissa.evaluate.choices import measure_choices
from ipissa.evaluate.degradation import Match, PlainText, matching_scale, prompt_degradation, text_degradation
from ipissa.evaluate.dial import ScaledDial
from ipissa.evaluate.methods import ADAPTER, Materials, made
from ipissa.evaluate.steerer import Steerer
from ipissa.evaluate.yardsticks import Yardsticks, measure_persona_prompt, measure_yardsticks

POLES = (-1.0, 1.0)
QUESTIONS = 64  # whose degradation is read, at most


@dataclass(frozen=True)
class Degradation:
    """Nats per token that text and questions lose at one α (`degradation`)."""

    alpha: float
    text: float
    prompt: float | None  # at the poles, where there are dilemmas


@dataclass(frozen=True)
class Measured:
    """One way to steer: the scale that gave it the adapter's degradation, and what it does there."""

    method: str
    scale: float | None  # None where there is none to choose
    equal: bool | None  # whether that gave it the adapter's degradation; None for prompts, True for the adapter
    yardsticks: Yardsticks
    degradation: list[Degradation]
    rows: pd.DataFrame | None  # per item and α (`measure_choices`); None without dilemmas

    def cost(self, *alphas: float) -> float:
        """Nats per token that unsteered answers to held-out prompts lose, on average over these α (the poles)."""
        lost = {each.alpha: each.text for each in self.degradation}
        asked = alphas or POLES
        return sum(lost[alpha] for alpha in asked) / len(asked)


def adapter_degradation(m: Materials) -> float:
    """What other methods are brought to: the adapter's, over both poles, on tuning texts."""
    with made(ADAPTER, m) as steerer:
        return over_poles(steerer, m, m.tuning)


def measure_method(
    method: str, m: Materials, dataset: Dataset | None, alphas: Sequence[float], *, degradation: float
) -> Measured:
    """Make a method, scale it to `degradation`, and measure it.

    The adapter and prompts stay as they are: the one is the measure of the others, and prompts have no scale.
    """
    with made(method, m) as steerer:
        scale, equal = None, True if method == ADAPTER else None
        if method != ADAPTER and steerer.told is None:
            match = scale_to(degradation, steerer, m)
            scale, equal = match.scale, match.equal
            steerer = replace(steerer, dial=ScaledDial(steerer.dial, scale))
        return Measured(
            method=method,
            scale=scale,
            equal=equal,
            yardsticks=_yardsticks(steerer, m),
            degradation=_degradations(steerer, m, dataset, alphas),
            rows=None if dataset is None else measure_choices(steerer, m.tokenizer, dataset, alphas),
        )


def scale_to(degradation: float, steerer: Steerer, m: Materials, *, start: float = 1.0) -> Match:
    """What a dial must be scaled by to cost so much on the tuning texts."""

    def costs(scale: float) -> float:
        return over_poles(Steerer(ScaledDial(steerer.dial, scale)), m, m.tuning)

    return matching_scale(costs, degradation, start=start)


def over_poles(steerer: Steerer, m: Materials, texts: Sequence[PlainText]) -> float:
    """Nats per token that these unsteered answers lose, on average over the poles."""
    lost = text_degradation(steerer, m.tokenizer, texts, POLES)
    return sum(lost.values()) / len(POLES)


def _yardsticks(steerer: Steerer, m: Materials) -> Yardsticks:
    if steerer.told is None:
        return measure_yardsticks(steerer.dial, m.held_out)
    return measure_persona_prompt(steerer.dial, m.held_out, told_by=steerer.told)


def _degradations(
    steerer: Steerer, m: Materials, dataset: Dataset | None, alphas: Sequence[float]
) -> list[Degradation]:
    questions = [] if dataset is None else spread([item.question() for item in dataset.items], QUESTIONS)

    alphas = steerer.supports(sorted({0.0, *alphas}))
    text = text_degradation(steerer, m.tokenizer, m.plain, alphas)
    prompt = {alpha: prompt_degradation(steerer, m.tokenizer, questions, alpha, PREFIX) for alpha in POLES if questions}
    return [Degradation(alpha, text[alpha], prompt.get(alpha)) for alpha in alphas]


def markdown(rows: Sequence[Measured]) -> str:
    """The yardsticks as a table."""
    lines = [
        "| method | scale | trait gain + | trait gain - | plain gain + | plain gain - | contrast + | contrast - |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for row in rows:
        poles = (row.yardsticks.positive, row.yardsticks.negative)
        cells = [_cell(getattr(pole, name)) for name in ("trait_gain", "plain_gain", "contrast") for pole in poles]
        scale = "" if row.scale is None else f"{row.scale:.3g}{'' if row.equal else ' (not equal)'}"
        lines.append(f"| {row.method} | {scale} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(estimate: Any) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
