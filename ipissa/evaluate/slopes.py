"""How far a score moves per unit of α, with its sign and standard errors that respect how items hang together.

Every item is asked at every α. With y the log-odds of Yes in nats and l = ±1 the label of the item's action,

    plain      slope of l y over α: what the trait gained, if the labels are balanced
    balanced   b₃ of  y = b₀ + b₁ l + b₂ α + b₃ l α: half of how much further actions of label +1 moved than
               those of -1. A taste for Yes moves both alike and is b₂, the acquiescence, whatever the labels
    published  slope of s l y with the side s = ±1: negated twice on the second side, so that a consistent
               model cancels and a taste for Yes does not; kept for comparison only

Standard errors: `paired`, every item against itself, from the spread of the items' own slopes; `clustered`,
the sandwich estimator with dilemmas as clusters (Liang and Zeger 1986). Intervals and p are of the clustered one, with
t on one degree of freedom per dilemma but one; where labels are not in every dilemma, per dilemma of the rarer label,
whose few dilemmas decide how large the error is and how well it is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests

from ipissa.data.items import MIN_DILEMMAS
from ipissa.errors import ConfigError


@dataclass(frozen=True)
class Slope:
    """Nats per unit of α, with a 95 % interval."""

    value: float
    low: float
    high: float
    t: float
    p: float
    clustered: float  # standard errors
    paired: float
    items: int
    dilemmas: int


@dataclass(frozen=True)
class BalancedSlope:
    """What the two kinds of actions do apart from each other, and what they do alike."""

    trait: Slope
    acquiescence: Slope


def plain_slope(rows: pd.DataFrame, *, published: bool = False) -> Slope:
    """Of l y, or of the published s l y; `rows` has item, dilemma, side, label, alpha, log_odds."""
    score = rows["log_odds"] * rows["label"] * (rows["side"] if published else 1)
    design = np.column_stack([np.ones(len(rows)), rows["alpha"]])
    own = _own_slopes(rows.assign(score=score), "score")
    return _slope(score, design, rows, column=1, paired=_error_of_mean(own.to_numpy()))


def can_be_balanced(rows: pd.DataFrame) -> bool:
    """Whether trait and acquiescence can be told apart: dilemmas of either label, enough of them for an error."""
    return dilemmas_of_the_rarer(rows) >= MIN_DILEMMAS


def dilemmas_of_the_rarer(rows: pd.DataFrame) -> int:
    """Dilemmas that have an action of the label that fewer of them have."""
    counts = rows.groupby("label")["dilemma"].nunique()
    return int(counts.min()) if len(counts) == 2 else 0


def balanced_slope(rows: pd.DataFrame) -> BalancedSlope:
    """The trait and acquiescence parts; `rows` as in `plain_slope`.

    Raises:
        ConfigError: `can_be_balanced` is false of them.
    """
    if not can_be_balanced(rows):
        raise ConfigError(
            f"{rows['dilemma'].nunique()} dilemmas have an answer at every α, {dilemmas_of_the_rarer(rows)} of them "
            f"of the rarer label; a slope needs {MIN_DILEMMAS} of each, so use more items."
        )
    label, alpha = rows["label"].to_numpy(float), rows["alpha"].to_numpy(float)
    design = np.column_stack([np.ones(len(rows)), label, alpha, label * alpha])
    own = _own_slopes(rows, "log_odds")
    labels = rows.groupby("item")["label"].first().loc[own.index]
    # The two classes are independent samples of items; each contributes half of its mean slope.
    shows, goes_against = (_error_of_mean(own[labels == side].to_numpy()) / 2 for side in (1, -1))
    paired = float(np.hypot(shows, goes_against))
    return BalancedSlope(
        trait=_slope(rows["log_odds"], design, rows, column=3, paired=paired, sure=dilemmas_of_the_rarer(rows)),
        acquiescence=_slope(rows["log_odds"], design, rows, column=2, paired=paired, sure=dilemmas_of_the_rarer(rows)),
    )


def _slope(
    y: pd.Series, design: np.ndarray, rows: pd.DataFrame, *, column: int, paired: float, sure: int | None = None
) -> Slope:
    """A coefficient of the fit; `sure` dilemmas say how well its error is known, all of them by default."""
    clusters = pd.factorize(rows["dilemma"])[0]
    fit = sm.OLS(y.to_numpy(float), design).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    count = int(clusters.max()) + 1
    freedom = (sure or count) - 1
    value, error = float(fit.params[column]), float(np.sqrt(max(fit.cov_params()[column, column], 0.0)))
    # The fit's correction for few clusters, G / (G - 1), is of all dilemmas.
    error *= math.sqrt((freedom + 1) / freedom / (count / (count - 1)))
    t = value / error if error > 0 else 0.0
    reach = float(stats.t.ppf(0.975, freedom)) * error
    return Slope(
        value=value,
        low=value - reach,
        high=value + reach,
        t=t,
        p=float(2 * stats.t.sf(abs(t), freedom)),
        clustered=error,
        paired=paired,
        items=rows["item"].nunique(),
        dilemmas=count,
    )


def _own_slopes(rows: pd.DataFrame, column: str) -> pd.Series:
    """The least-squares slope over α of every item by itself."""
    table = rows.pivot(index="item", columns="alpha", values=column)
    alphas = table.columns.to_numpy(float)
    centred = alphas - alphas.mean()
    return table @ centred / (centred @ centred)


def _error_of_mean(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def value_slopes(rows: pd.DataFrame, labels: Mapping[str, Mapping[int, int]]) -> pd.DataFrame:
    """The balanced slope of every value that enough dilemmas speak of, corrected for testing many.

    Args:
        rows: item, dilemma, side, alpha, log_odds of all items.
        labels: Per value, the label of every item that has one.

    Returns:
        A row per value, its `name`: the fields of `Slope`, the acquiescence, and p after Holm and Benjamini-Hochberg.
    """
    found = []
    for value, by_item in labels.items():
        own = with_labels(rows, by_item)
        if can_be_balanced(own):
            slope = balanced_slope(own)
            found.append({"name": value, **vars(slope.trait), "acquiescence": slope.acquiescence.value})
    table = pd.DataFrame(found)
    if found:
        table["p_holm"] = corrected(table["p"], method="holm")
        table["p_bh"] = corrected(table["p"], method="fdr_bh")
    return table


def with_labels(rows: pd.DataFrame, by_item: Mapping[int, int]) -> pd.DataFrame:
    """The rows of labelled items, with a column `label`."""
    return rows.assign(label=rows["item"].map(by_item)).dropna(subset=["label"])


def corrected(p: Sequence[float] | pd.Series, *, method: str) -> np.ndarray:
    """p values after `holm` (family-wise) or `fdr_bh` (false discovery rate), in their order."""
    return multipletests(np.asarray(p, dtype=float), method=method)[1]
