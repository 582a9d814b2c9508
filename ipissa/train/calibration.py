"""Find how far the dial may be turned before text falls apart, from text generated at each α.

At every α of a grid the steered model answers held-out prompts, at α = 0 several times: all other readings are
compared with that one. The base model then reads those answers. Text holds together at α while all hold:

    fluency     its mean log-likelihood per token under the base model is at most
                MAX_EXCESS_NATS below that of the answers at α = 0; at every token it is averaged over
                what might have been drawn there, which leaves out most of the chance in it
    repetition  the share of distinct 3-grams is at least MIN_DISTINCT of that at α = 0
    shift       the total variation between the steered and the base model's next-token
                distributions, averaged over its tokens, is at most MAX_VARIATION

and the calibrated range ends at the largest |α| on each side up to which every grid point holds. Beyond the
first that does not, nothing is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from ipissa.adapter.described import Described
from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Sampling, generate_ids, seeded
from ipissa.errors import NotFiniteError, TrainingError
from ipissa.evaluate.held_out import LEAST_LOGPROB
from ipissa.sequences import continuation_logprobs, pad_batch
from ipissa.steering import SteeredModel

logger = logging.getLogger(__name__)
GRID = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
MAX_EXCESS_NATS = 0.5
MIN_DISTINCT = 0.9
MAX_VARIATION = 0.5
NGRAM = 3
DRAWS_AT_ZERO = 4  # answers per prompt
A = TypeVar("A", bound=Described)
PROMPTS = 24  # answered at every α
REMEDY_OF_TRAINING = (
    "use a lower --lr (with --resume, which keeps the sampled texts), or more --continuations (after removing the "
    "run's folder)"
)


@dataclass(frozen=True)
class CalibrationPoint:
    """How text written at one α reads."""

    alpha: float
    base_nats: float  # mean -log p per token under the base model
    error: float  # standard error of that, over answers
    distinct: float  # share of distinct 3-grams
    variation: float  # total variation per token, from 0 to 1
    holds: bool = True


@dataclass(frozen=True)
class Calibration:
    """The range in which text holds together, and the points it was read from, by rising α."""

    low: float
    high: float
    points: list[CalibrationPoint]
    prompts: int  # answered at every α
    sampling: Sampling  # how they were answered

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def calibrate(
    steered: SteeredModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    seed: int,
    grid: Sequence[float] = GRID,
    remedy: str = REMEDY_OF_TRAINING,
) -> Calibration:
    """Sweep α over ±grid on `prompts`, which are asked as a user without a persona asks.

    Args:
        remedy: What to do where there is no range.

    Raises:
        TrainingError: text falls apart at the smallest |α| of the grid, on either side.
        NotFiniteError: what the base model predicts is not finite.
    """
    contexts = [chat_ids(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    with tqdm(total=1 + 2 * len(grid), desc="calibration", unit="α") as bar:

        def read(alpha: float) -> CalibrationPoint | None:
            bar.update()
            try:
                point = _read_back(steered, tokenizer, contexts, alpha, [seed], sampling)
            except NotFiniteError as error:
                logger.warning("The range ends before α = %+g: %s", alpha, error)
                return None
            return replace(point, holds=_holds(point, at_zero))

        bar.update()
        seeds = [seed + draw for draw in range(DRAWS_AT_ZERO)]
        at_zero = _read_back(steered, tokenizer, contexts, 0.0, seeds, sampling)
        below = _walk(read(-size) for size in sorted(grid))
        above = _walk(read(size) for size in sorted(grid))
    low, high = _end_of_range(below), _end_of_range(above)
    if not low < 0 < high:
        raise TrainingError(f"Text falls apart already at |α| = {min(grid)}; {remedy}.")
    points = [*reversed(below), at_zero, *above]
    return Calibration(low, high, points=points, prompts=len(prompts), sampling=sampling)


def with_range(adapter: A, calibration: Calibration) -> A:
    """The adapter with the range that was found, and what that was read from."""
    evaluation = adapter.evaluation | {"calibration": calibration.to_dict()}
    return replace(adapter, alpha_range=(calibration.low, calibration.high), evaluation=evaluation, digest=None)


def _walk(outwards: Iterable[CalibrationPoint | None]) -> list[CalibrationPoint]:
    """The points of one side up to the first at which text falls apart, without it where there is no text."""
    points: list[CalibrationPoint] = []
    for point in outwards:
        if point is None:
            break
        points.append(point)
        if not point.holds:
            break
    return points


def _end_of_range(points: Sequence[CalibrationPoint]) -> float:
    """The last α of one side that holds, 0 if none does."""
    return next((point.alpha for point in reversed(points) if point.holds), 0.0)


def _holds(point: CalibrationPoint, untouched: CalibrationPoint) -> bool:
    return (
        point.base_nats <= untouched.base_nats + MAX_EXCESS_NATS
        and point.distinct >= MIN_DISTINCT * untouched.distinct
        and point.variation <= MAX_VARIATION
    )


def _read_back(
    steered: SteeredModel,
    tokenizer: Any,
    contexts: list[list[int]],
    alpha: float,
    seeds: Sequence[int],
    sampling: Sampling,
) -> CalibrationPoint:
    """How answers sampled at α read, one per context and seed."""
    parts = [_read_draw(steered, tokenizer, contexts, alpha, seed, sampling) for seed in seeds]
    nats, variation, tokens, distinct = (np.concatenate(figure) for figure in zip(*parts, strict=True))
    mean = nats.sum() / tokens.sum()
    return CalibrationPoint(
        alpha=alpha,
        base_nats=float(mean),
        error=float(((nats - mean * tokens) ** 2).sum() ** 0.5 / tokens.sum()),  # of a ratio of sums
        distinct=float(distinct.mean()),
        variation=float(variation.sum() / tokens.sum()),
    )


@torch.no_grad()
def _read_draw(
    steered: SteeredModel, tokenizer: Any, contexts: list[list[int]], alpha: float, seed: int, sampling: Sampling
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per answer: nats and total variation, summed over its tokens, how many these are, and distinct 3-grams."""
    with seeded(steered.model, seed), steered.alpha(alpha):
        answers = generate_ids(steered.model, tokenizer, contexts, **sampling.settings())
    batch = pad_batch(contexts, answers, pad_id=tokenizer.pad_token_id, device=steered.model.device)
    with steered.alpha(0.0):
        base = continuation_logprobs(steered.model, batch)
    shifted = base
    if alpha:
        with steered.alpha(alpha):
            shifted = continuation_logprobs(steered.model, batch)
    variation = (base.exp() - shifted.exp()).abs().sum(-1) / 2  # (batch, tokens)
    drawn_from = sampling.kept(shifted.flatten(0, 1)).softmax(-1).view_as(shifted)
    nats = -(drawn_from * base.clamp(min=LEAST_LOGPROB)).sum(-1)
    return (
        (nats * batch.mask).sum(-1).double().cpu().numpy(),
        (variation * batch.mask).sum(-1).double().cpu().numpy(),
        batch.mask.sum(-1).cpu().numpy(),
        np.array([distinct_share(answer) for answer in answers]),
    )


def distinct_share(tokens: Sequence[int]) -> float:
    """Distinct 3-grams over all 3-grams; 1 for texts too short to have two."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
