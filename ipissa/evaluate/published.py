"""The figures of the published evaluations, under their names, for comparison with their tables.

Several are blind where it matters: Effect to the sign of steering, Gain to text that breaks at α = -1,
and all of them to a taste for Yes where scores are negated twice. `slopes` has the ones to rely on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

MIN_MASS = 0.05
COHERENT_SHARE = 0.8
COHERENT_NATS = 1.0


@dataclass(frozen=True)
class Effect:
    """|t| and p of score ~ α over pooled rows, by ordinary least squares, and what else that fit offers."""

    effect: float
    p: float
    slope: float
    ci95: float  # max(0, |slope| - 1.96 standard errors)
    pearson: float
    spearman: float
    slope_by_p: float  # slope (1 - p)


def effect(scores: Sequence[float], alphas: Sequence[float]) -> Effect:
    """Effect over rows, each with its score and α. Scores that do not vary at all have no effect."""
    y, x = np.asarray(scores, dtype=float), np.asarray(alphas, dtype=float)
    if np.ptp(y) == 0:
        return Effect(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    fit = stats.linregress(x, y)
    t = fit.slope / fit.stderr if fit.stderr > 0 else np.inf * np.sign(fit.slope)
    return Effect(
        effect=float(abs(t)),
        p=float(fit.pvalue),
        slope=float(fit.slope),
        ci95=float(max(0.0, abs(fit.slope) - 1.96 * fit.stderr)),
        pearson=float(fit.rvalue),
        spearman=float(stats.spearmanr(x, y).statistic),
        slope_by_p=float(fit.slope * (1 - fit.pvalue)),
    )


def gain(effect: float, degradation: float) -> float:
    """100 Effect / (1 + max(0, Degradation)), in per cent; degradation in nats per token of the prompt."""
    return 100 * effect / (1 + max(0.0, degradation))


def transfer(means: pd.DataFrame, target: str) -> float:
    """Mean over the other values of |mean score at +1 - mean score at 0|; `means` is (α, value)."""
    others = means.drop(columns=[target])
    return float((others.loc[1.0] - others.loc[0.0]).abs().mean()) if others.shape[1] else 0.0


def cluster_slopes(means: pd.DataFrame, target: str, clusters: Mapping[str, str]) -> pd.DataFrame:
    """How much more than the target each cluster of values moves, largest first.

    The target's mean score is fitted by a line in α; every value's mean is regressed on that line; its slope
    less 1 is averaged over the values of a cluster. 0: it moves as the target does; -1: it does not move.

    Args:
        means: Mean scores, (α, value).
        clusters: The cluster of every value that has one.
    """
    alphas = means.index.to_numpy(float)
    predicted = np.polyval(np.polyfit(alphas, means[target].to_numpy(float), 1), alphas)
    if np.ptp(predicted) == 0:
        return pd.DataFrame(columns=["cluster", "slope_less_1", "values", "rank"])
    excess = {value: stats.linregress(predicted, means[value]).slope - 1 for value in means if value != target}
    table = pd.DataFrame(
        [{"cluster": clusters[value], "slope_less_1": each} for value, each in excess.items() if value in clusters],
        columns=["cluster", "slope_less_1"],
    )
    found = table.groupby("cluster")["slope_less_1"].agg(slope_less_1="mean", values="size")
    found["rank"] = found["slope_less_1"].rank(ascending=False).astype(int)
    return found.sort_values("rank").reset_index()


def coherent(valid: float, degradation: float) -> bool:
    """Whether 80 % of rows are valid and questions lose less than 1 nat per token."""
    return valid >= COHERENT_SHARE and degradation < COHERENT_NATS


def loss_gap(history: pd.DataFrame) -> float | None:
    """Held-out loss less training loss at the last validation of a run: below 3 good, above 10 catastrophic.

    Args:
        history: `history.csv` of a run, `loss` per step and `eval_loss` at validations. Without any, None.
    """
    if "eval_loss" not in history or not history["eval_loss"].notna().any():
        return None
    last = history["eval_loss"].last_valid_index()
    seen = history.loc[:last]
    before = seen["eval_loss"].shift().last_valid_index()  # the row after the validation before
    since = seen.loc[before:] if before is not None else seen
    return float(history.loc[last, "eval_loss"] - since["loss"].mean())


@dataclass(frozen=True)
class SteeringF1:
    """Wrong answers put right, against right ones put wrong and controls that change at all."""

    f1: float | None  # None where a pole's choice mass is below `MIN_MASS`, and without controls
    correct: float
    wrong: float
    arbitrary: float
    swapped: bool


def steering_f1(scores: pd.DataFrame, controls: Sequence[pd.DataFrame], mass: Mapping[int, float]) -> SteeringF1:
    """Steering F1, unclipped, in per cent.

    Items are weighted by how sure the model was at α = 0, w = |y₀| / Σ|y₀|, within targets and within
    each domain of controls, so that sums cannot hide what happens to matters of taste. net = max(0,
    correct - wrong) is the recall, net / (net + arbitrary) the precision, and F1 is multiplied by
    (smaller choice mass of the poles / that at 0)².

    Args:
        scores: l y of target items, columns -1, 0 and 1.
        controls: The same of maths items and of preference items; empty where there are none.
        mass: Mean choice mass at -1, 0 and 1.
    """
    swapped = bool(scores[1].mean() < scores[-1].mean())
    up = scores[-1] if swapped else scores[1]
    w = _weights(scores[0])
    correct = float(w[(scores[0] < 0) & (up > 0)].sum())
    wrong = float(w[(scores[0] > 0) & (up < 0)].sum())
    arbitrary = sum(_arbitrary(domain) for domain in controls)
    smaller = min(mass[1], mass[-1])
    if smaller < MIN_MASS or all(
        domain.empty for domain in controls
    ):  # without controls nothing could ever be arbitrary
        return SteeringF1(None, correct, wrong, arbitrary, swapped)
    net = max(0.0, correct - wrong)
    precision = net / (net + arbitrary) if net > 0 else 0.0
    f1 = 2 * precision * net / (precision + net) if net > 0 else 0.0
    return SteeringF1(100 * f1 * (smaller / mass[0]) ** 2, correct, wrong, arbitrary, swapped)


def _arbitrary(controls: pd.DataFrame) -> float:
    """The weight of the items of one domain whose answer changes at a pole."""
    changed = (controls.gt(0).ne(controls[0].gt(0), axis=0)).any(axis=1)
    return float(_weights(controls[0])[changed].sum())


def _weights(y: pd.Series) -> pd.Series:
    total = y.abs().sum()
    return y.abs() / total if total > 0 else y * 0.0
