"""An adapter beside other ways to steer: the yardsticks of each, on the same texts in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ipissa.adapter.checkpoint import Adapter
from ipissa.data.continuations import Continuation
from ipissa.data.pairs import ContrastivePair
from ipissa.data.personas import Trait
from ipissa.evaluate.baselines.random import random_like
from ipissa.evaluate.baselines.sspace import SSpaceDial
from ipissa.evaluate.baselines.tuners import TUNERS, trained_tuner
from ipissa.evaluate.baselines.vectors import VectorDial, first_components, mean_differences
from ipissa.evaluate.dial import Dial, HookDial
from ipissa.evaluate.yardsticks import Yardsticks, measure_persona_prompt, measure_yardsticks
from ipissa.steering import attach
from ipissa.train.config import TrainConfig
from ipissa.train.objectives.distill import Target

METHODS = ("prompt", "caa", "repeng", "sspace", "random", *TUNERS)
QUICK_METHODS = METHODS[: -len(TUNERS)]  # those that need no training
SCALES = (0.03, 0.1, 0.3, 1.0)
VECTOR_DEPTH = (1 / 3, 2 / 3)  # blocks that get a vector, as fractions of the depth


@dataclass(frozen=True)
class Compared:
    """One method's yardsticks, and the scale at which α = 1 served it best on other texts."""

    method: str
    scale: float | None
    yardsticks: Yardsticks


@dataclass(frozen=True)
class Materials:
    """What methods are made from, and what they are measured on.

    Args:
        pairs: Contrastive pairs that vectors are computed from.
        tuning: Labelled continuations of training prompts, to choose scales on.
        test: Labelled continuations of held-out prompts.
        learn: The adapter's training settings and targets, for methods that are trained as it was.
    """

    model: Any
    tokenizer: Any
    trait: Trait
    adapter: Adapter
    pairs: Sequence[ContrastivePair]
    tuning: Sequence[Continuation]
    test: Sequence[Continuation]
    learn: Callable[[], tuple[TrainConfig, Sequence[Target]]]
    seed: int = 0

    def measured(self, dial: Dial) -> Yardsticks:
        """The yardsticks of a dial on the test texts."""
        return measure_yardsticks(dial, self.tokenizer, self.trait, self.test)


def compare(materials: Materials, *, methods: Sequence[str] = QUICK_METHODS) -> Iterator[Compared]:
    """Measure the adapter and then each method at |α| = 1, on the same texts.

    Methods without a natural unit are given the scale, of `SCALES`, whose smaller trait gain over the two
    poles is largest on the tuning texts, so that each is seen at its best.
    """
    with attached(materials.model, materials.adapter) as dial:
        yield Compared("adapter", None, materials.measured(dial))
    for method in methods:
        yield _compared(method, materials)


def _compared(method: str, m: Materials) -> Compared:
    if method == "prompt":
        return Compared(method, None, measure_persona_prompt(HookDial(m.model), m.tokenizer, m.trait, m.test))
    if method == "random":
        with attached(m.model, random_like(m.adapter, seed=m.seed)) as dial:
            return Compared(method, None, m.measured(dial))
    if method in TUNERS:
        with trained_tuner(method, m.model, m.tokenizer, *m.learn()) as tuned:
            return Compared(method, None, m.measured(tuned))
    other = _baseline(method, m)
    try:
        other.scale = max(SCALES, key=lambda scale: _worse_gain(other, scale, m))
        return Compared(method, other.scale, m.measured(other))
    finally:
        other.detach()


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


def _baseline(method: str, m: Materials) -> HookDial:
    if method == "sspace":
        return SSpaceDial(m.model, m.tokenizer, m.pairs, list(m.adapter.modules), rank=m.adapter.config.rank)
    depth = m.model.config.get_text_config().num_hidden_layers
    first, last = (int(fraction * depth) for fraction in VECTOR_DEPTH)
    directions = {"caa": mean_differences, "repeng": first_components}[method]
    return VectorDial(m.model, directions(m.model, m.tokenizer, m.pairs, range(first, max(last, first + 1))))


def _worse_gain(dial: HookDial, scale: float, m: Materials) -> float:
    dial.scale = scale
    yardsticks = measure_yardsticks(dial, m.tokenizer, m.trait, m.tuning)
    return min(yardsticks.positive.trait_gain.value, yardsticks.negative.trait_gain.value)


@contextmanager
def attached(model: Any, adapter: Adapter) -> Iterator[Dial]:
    """The model with the adapter on it inside the block."""
    steered = attach(model, adapter)
    try:
        yield steered
    finally:
        steered.detach()
