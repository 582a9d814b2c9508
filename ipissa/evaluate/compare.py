"""An adapter beside other ways to steer: the yardsticks of each, on the same texts in the same run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ipissa.adapter.checkpoint import Adapter
from ipissa.data.continuations import Continuation
from ipissa.data.pairs import ContrastivePair
from ipissa.data.personas import Trait
from ipissa.evaluate.baselines.random import random_like
from ipissa.evaluate.baselines.sspace import SSpaceDial
from ipissa.evaluate.baselines.vectors import VectorDial, first_components, mean_differences
from ipissa.evaluate.dial import Dial, HookDial
from ipissa.evaluate.yardsticks import Yardsticks, measure_yardsticks
from ipissa.steering import attach

METHODS = ("caa", "repeng", "sspace", "random")
SCALES = (0.03, 0.1, 0.3, 1.0)
VECTOR_DEPTH = (1 / 3, 2 / 3)  # blocks that get a vector, as fractions of the depth


@dataclass(frozen=True)
class Compared:
    """One method's yardsticks, and the scale at which α = 1 served it best on other texts."""

    method: str
    scale: float | None
    yardsticks: Yardsticks


def compare(
    model: Any,
    tokenizer: Any,
    trait: Trait,
    adapter: Adapter,
    pairs: Sequence[ContrastivePair],
    tuning: Sequence[Continuation],
    test: Sequence[Continuation],
    *,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
) -> list[Compared]:
    """Measure the adapter and each method at |α| = 1.

    Methods without a natural unit are given the scale, of `SCALES`, whose smaller trait gain over the two
    poles is largest on `tuning`, so that each is seen at its best.

    Args:
        pairs: Contrastive pairs that vectors are computed from.
        tuning: Labelled continuations of training prompts.
        test: Labelled continuations of held-out prompts.
    """
    with _attached(model, adapter) as dial:
        found = [Compared("adapter", None, measure_yardsticks(dial, tokenizer, trait, test))]
    for method in methods:
        if method == "random":
            with _attached(model, random_like(adapter, seed=seed)) as dial:
                found.append(Compared(method, None, measure_yardsticks(dial, tokenizer, trait, test)))
            continue
        other = _baseline(method, model, tokenizer, adapter, pairs)
        try:
            other.scale = max(SCALES, key=lambda scale: _worse_gain(other, scale, tokenizer, trait, tuning))
            found.append(Compared(method, other.scale, measure_yardsticks(other, tokenizer, trait, test)))
        finally:
            other.detach()
    return found


def markdown(rows: Sequence[Compared]) -> str:
    """The comparison as a table."""
    lines = [
        "| method | scale | trait gain + | trait gain - | plain gain + | plain gain - | contrast + | contrast - |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for row in rows:
        poles = (row.yardsticks.positive, row.yardsticks.negative)
        cells = [
            f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
            for name in ("trait_gain", "plain_gain", "contrast")
            for estimate in (getattr(pole, name) for pole in poles)
        ]
        scale = "" if row.scale is None else f"{row.scale:g}"
        lines.append(f"| {row.method} | {scale} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _baseline(method: str, model: Any, tokenizer: Any, adapter: Adapter, pairs: Sequence[ContrastivePair]) -> HookDial:
    if method == "sspace":
        return SSpaceDial(model, tokenizer, pairs, list(adapter.modules), rank=adapter.config.rank)
    depth = model.config.get_text_config().num_hidden_layers
    first, last = (int(fraction * depth) for fraction in VECTOR_DEPTH)
    directions = {"caa": mean_differences, "repeng": first_components}[method]
    return VectorDial(model, directions(model, tokenizer, pairs, range(first, max(last, first + 1))))


def _worse_gain(dial: HookDial, scale: float, tokenizer: Any, trait: Trait, tuning: Sequence[Continuation]) -> float:
    dial.scale = scale
    yardsticks = measure_yardsticks(dial, tokenizer, trait, tuning)
    return min(yardsticks.positive.trait_gain.value, yardsticks.negative.trait_gain.value)


@contextmanager
def _attached(model: Any, adapter: Adapter) -> Iterator[Dial]:
    steered = attach(model, adapter)
    try:
        yield steered
    finally:
        steered.detach()
