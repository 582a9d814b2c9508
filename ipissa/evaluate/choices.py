"""What a model chooses in dilemmas, at every α: log-odds of Yes against No after "My choice:"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from ipissa.data.items import CHOICES, PREFIX, Dataset
from ipissa.errors import ConfigError
from ipissa.evaluate.scoring import ROWS_PER_BATCH, NextTokens, find_choices, score_contexts
from ipissa.evaluate.steerer import Steerer

MASS_FLOOR = 0.01  # of the likeliest next token's probability; below it the model answers something else
MIN_VALID = 0.5  # of items at α = 0


def measure_choices(
    steerer: Steerer,
    tokenizer: Any,
    dataset: Dataset,
    alphas: Sequence[float],
    *,
    rows_per_batch: int = ROWS_PER_BATCH,
) -> pd.DataFrame:
    """A row per item and α: item, dilemma, side, domain, alpha, log_odds, yes, no, choice_mass, valid.

    log_odds is NaN where the choices together have less than a hundredth of the likeliest token's probability.

    Raises:
        ConfigError: the model hardly ever answers Yes or No at α = 0.
    """
    asked = steerer.supports(sorted({0.0, *alphas}))
    choices = find_choices(tokenizer, CHOICES)
    questions = [item.question() for item in dataset.items]

    def scored(contexts: list[list[int]], dialled: Sequence[float]) -> NextTokens:
        return score_contexts(steerer.dial, tokenizer, contexts, choices, dialled, rows_per_batch=rows_per_batch)

    if steerer.told is None:
        found = scored(steerer.contexts(tokenizer, questions, 0.0, PREFIX), asked)
    else:
        parts = [scored(steerer.contexts(tokenizer, questions, alpha, PREFIX), [0.0]) for alpha in asked]
        found = NextTokens(torch.cat([p.choices for p in parts], 1), torch.cat([p.likeliest for p in parts], 1))
    rows = pd.DataFrame(
        [
            _row(index, dataset, alpha, found.choices[index, a].tolist(), float(found.likeliest[index, a]))
            for index in range(len(questions))
            for a, alpha in enumerate(asked)
        ]
    )
    _check_answers(rows)
    return rows


def _row(index: int, dataset: Dataset, alpha: float, logprobs: Sequence[float], likeliest: float) -> dict[str, Any]:
    item = dataset.items[index]
    yes, no = logprobs
    mass = math.exp(yes) + math.exp(no)
    valid = mass >= MASS_FLOOR * math.exp(likeliest)
    return {
        "item": index,
        "dilemma": item.dilemma,
        "side": item.side,
        "domain": item.domain,
        "alpha": alpha,
        "log_odds": yes - no if valid else math.nan,
        "yes": yes,
        "no": no,
        "choice_mass": mass,
        "valid": valid,
    }


def _check_answers(rows: pd.DataFrame) -> None:
    unsteered = rows[rows["alpha"] == 0]
    share = unsteered["valid"].mean()
    if share < MIN_VALID:
        raise ConfigError(
            f'After "{PREFIX}" this model answers neither {CHOICES[0]} nor {CHOICES[1]}: they have '
            f"{unsteered['choice_mass'].mean():.2g} of the probability on average, and only {share:.0%} of items can "
            "be scored; use an instruction-tuned model."
        )


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of dilemmas whose items are all valid at every α: the same ones at each, no side without the other."""
    return rows[rows.groupby("dilemma")["valid"].transform("all").astype(bool)]
