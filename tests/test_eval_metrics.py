"""Slopes and published figures, against numbers worked out by hand and other implementations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats

from ipissa.errors import ConfigError
from ipissa.evaluate import published
from ipissa.evaluate.analysis import value_means
from ipissa.evaluate.response import Flips, Symmetry, flips, monotonic_share, symmetry
from ipissa.evaluate.slopes import balanced_slope, corrected, plain_slope, value_slopes

ALPHAS = (-1.0, 0.0, 1.0)


def made_rows(
    honest: float, yes: float, *, dilemmas: int = 40, first_share: float = 0.7, noise: float = 0.0, paired: bool = True
) -> pd.DataFrame:
    """A model whose log-odds move by `honest` nats for the honest answer and `yes` for Yes, per unit of α."""
    rng = np.random.default_rng(0)
    rows = []
    for d in range(dilemmas):
        honest_side = 1 if d < first_share * dilemmas else -1
        for side in (1, -1) if paired else (1,):
            label = side * honest_side
            base, own = rng.normal(0, 2), rng.normal(0, noise)
            for alpha in ALPHAS:
                y = base + alpha * (honest * label + yes + own)
                rows.append((2 * d + (side < 0), f"d{d}", side, label, alpha, y))
    return pd.DataFrame(rows, columns=["item", "dilemma", "side", "label", "alpha", "log_odds"])


def test_a_consistent_honest_shift_of_two_nats_scores_two() -> None:
    rows = made_rows(honest=2, yes=0)
    assert plain_slope(rows).value == pytest.approx(2)
    assert balanced_slope(rows).trait.value == pytest.approx(2)
    assert balanced_slope(rows).acquiescence.value == pytest.approx(0, abs=1e-9)
    assert plain_slope(rows, published=True).value == pytest.approx(0, abs=1e-9)  # negated twice, it cancels


def test_a_pure_taste_for_yes_scores_nothing_on_the_balanced_score() -> None:
    rows = made_rows(honest=0, yes=2)
    assert balanced_slope(rows).trait.value == pytest.approx(0, abs=1e-9)
    assert balanced_slope(rows).acquiescence.value == pytest.approx(2)
    # (0.7 - 0.3) of 2 nats, where the first side is honest in 70 % of dilemmas
    assert plain_slope(rows, published=True).value == pytest.approx(0.8)
    unpaired = made_rows(honest=0, yes=2, paired=False)
    assert plain_slope(unpaired).value == pytest.approx(0.8)  # the plain score needs balanced labels
    assert balanced_slope(unpaired).trait.value == pytest.approx(0, abs=1e-9)


def test_what_cannot_be_balanced_has_no_slope() -> None:
    rows = made_rows(honest=0, yes=2)
    rare = made_rows(honest=0, yes=2, dilemmas=20, first_share=0.9, paired=False)  # two dilemmas of the other label
    for few in (rows[rows["label"] == 1], rows[rows["dilemma"].isin(rows["dilemma"].unique()[:2])], rare, rows[:0]):
        with pytest.raises(ConfigError, match="use more items"):
            balanced_slope(few)


def test_clustered_errors_equal_the_sandwich_by_hand() -> None:
    rows = made_rows(honest=0.3, yes=0.2, noise=0.5, dilemmas=12)
    x = np.column_stack([np.ones(len(rows)), rows["alpha"]])
    y = (rows["log_odds"] * rows["label"]).to_numpy()
    bread = np.linalg.inv(x.T @ x)
    residuals = y - x @ (bread @ x.T @ y)
    meat = np.zeros((2, 2))
    for _, index in rows.groupby("dilemma").indices.items():
        score = x[index].T @ residuals[index]
        meat += np.outer(score, score)
    g, n = 12, len(rows)
    expected = np.sqrt((bread @ meat @ bread)[1, 1] * g / (g - 1) * (n - 1) / (n - 2))
    found = plain_slope(rows)
    assert found.clustered == pytest.approx(expected)
    assert found.t == pytest.approx(found.value / expected)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.t), g - 1))
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, g - 1) * expected)
    assert (found.items, found.dilemmas) == (24, 12)


def test_the_balanced_slopes_errors_equal_the_sandwich_by_hand() -> None:
    """Four coefficients; degrees of freedom, and the correction for few clusters, by the rarer label."""
    rows = made_rows(honest=0.3, yes=0.2, noise=0.5, dilemmas=12)
    rows = rows[(rows["label"] > 0) | rows["dilemma"].isin(sorted(rows["dilemma"].unique())[:7])]
    label, alpha = rows["label"].to_numpy(float), rows["alpha"].to_numpy(float)
    x = np.column_stack([np.ones(len(rows)), label, alpha, label * alpha])
    y = rows["log_odds"].to_numpy()
    bread = np.linalg.inv(x.T @ x)
    residuals = y - x @ (bread @ x.T @ y)
    scores = [x[index].T @ residuals[index] for index in rows.groupby("dilemma").indices.values()]
    meat = sum(np.outer(score, score) for score in scores)
    g, n = 7, len(rows)
    errors = np.sqrt(np.diag(bread @ meat @ bread) * g / (g - 1) * (n - 1) / (n - 4))
    found = balanced_slope(rows)
    for part, at in ((found.acquiescence, 2), (found.trait, 3)):
        value = (bread @ x.T @ y)[at]
        assert part.value == pytest.approx(value)
        assert part.clustered == pytest.approx(errors[at])
        assert part.t == pytest.approx(value / errors[at])
        assert part.p == pytest.approx(2 * stats.t.sf(abs(value / errors[at]), 7 - 1))
        assert part.high - part.value == pytest.approx(stats.t.ppf(0.975, 7 - 1) * errors[at])


def test_paired_errors_are_those_of_the_items_own_slopes() -> None:
    rows = made_rows(honest=0.3, yes=0.1, noise=0.5, dilemmas=15)
    own = [np.polyfit(group["alpha"], group["log_odds"] * group["label"], 1)[0] for _, group in rows.groupby("item")]
    found = plain_slope(rows)
    assert found.value == pytest.approx(np.mean(own))
    assert found.paired == pytest.approx(stats.sem(own))
    positive = [np.polyfit(g["alpha"], g["log_odds"], 1)[0] for _, g in rows[rows.label > 0].groupby("item")]
    negative = [np.polyfit(g["alpha"], g["log_odds"], 1)[0] for _, g in rows[rows.label < 0].groupby("item")]
    balanced = balanced_slope(rows).trait
    assert balanced.value == pytest.approx((np.mean(positive) - np.mean(negative)) / 2)
    assert balanced.paired == pytest.approx(np.hypot(stats.sem(positive), stats.sem(negative)) / 2)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        rows = made_rows(honest=0, yes=0, dilemmas=20)
        shift = dict(zip(rows["dilemma"].unique(), rng.normal(0.4, 1, 20), strict=True))
        rows["log_odds"] += rows["label"] * rows["alpha"] * rows["dilemma"].map(shift)  # shared within a dilemma
        slope = balanced_slope(rows).trait
        hits += slope.low <= 0.4 <= slope.high
    assert 178 <= hits <= 199


def test_intervals_cover_the_truth_where_one_label_is_rare() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(200):
        rows = made_rows(honest=0, yes=0, dilemmas=20, first_share=0.85, paired=False)  # three of the other label
        shift = dict(zip(rows["dilemma"].unique(), rng.normal(0.4, 1, 20), strict=True))
        rows["log_odds"] += rows["label"] * rows["alpha"] * rows["dilemma"].map(shift)
        slope = balanced_slope(rows).trait
        hits += slope.low <= 0.4 <= slope.high
    assert hits >= 185  # with a degree of freedom per dilemma it is about 174


def test_a_taste_for_yes_has_no_shape_however_labels_are_shared_out() -> None:
    rows = made_rows(honest=0, yes=2, dilemmas=20, first_share=0.8, paired=False)
    means = value_means(rows, {"honesty": dict(zip(rows["item"], rows["label"], strict=True)), "none": {}})
    assert list(means.columns) == ["honesty"]
    assert means.loc[1.0, "honesty"] == pytest.approx(means.loc[-1.0, "honesty"])


def test_values_are_corrected_for_testing_many() -> None:
    rows = made_rows(honest=1, yes=0, noise=1, dilemmas=30).drop(columns="label")
    truth = {item: 1 if item % 2 == 0 else -1 for item in rows["item"].unique()}
    rng = np.random.default_rng(1)
    labels = {"honesty": truth} | {f"chance {i}": {item: int(rng.choice([1, -1])) for item in truth} for i in range(6)}
    labels["rare"] = dict.fromkeys(list(truth)[:4], 1)  # two dilemmas, one label: nothing can be said
    table = value_slopes(rows, labels).set_index("name")
    assert "rare" not in table.index
    assert len(table) == 7
    p = table["p"].to_numpy()
    ranked = np.sort(p)
    holm = np.minimum(np.maximum.accumulate(ranked * np.arange(7, 0, -1)), 1)
    assert np.sort(table["p_holm"]) == pytest.approx(holm)
    bh = np.minimum(np.minimum.accumulate((ranked * 7 / np.arange(1, 8))[::-1])[::-1], 1)
    assert np.sort(table["p_bh"]) == pytest.approx(bh)
    assert corrected([0.01, 0.5], method="holm") == pytest.approx([0.02, 0.5])


def test_effect_is_the_t_of_ordinary_least_squares() -> None:
    rng = np.random.default_rng(0)
    alphas = np.repeat(ALPHAS, 30)
    scores = 0.4 * alphas + rng.normal(0, 1, 90)
    fit = sm.OLS(scores, sm.add_constant(alphas)).fit()
    found = published.effect(scores, alphas)
    assert found.effect == pytest.approx(abs(fit.tvalues[1]))
    assert found.p == pytest.approx(fit.pvalues[1])
    assert found.slope == pytest.approx(fit.params[1])
    assert found.ci95 == pytest.approx(max(0, abs(fit.params[1]) - 1.96 * fit.bse[1]))
    assert found.pearson == pytest.approx(np.corrcoef(alphas, scores)[0, 1])
    assert found.spearman == pytest.approx(stats.spearmanr(alphas, scores).statistic)
    assert found.slope_by_p == pytest.approx(found.slope * (1 - found.p))
    mirrored = published.effect(-scores, alphas)
    assert mirrored.effect == pytest.approx(found.effect)  # blind to the sign, which the slope is not
    assert mirrored.slope == pytest.approx(-found.slope)
    assert published.effect([1.0, 1.0], [0.0, 1.0]).effect == 0


def test_gain_is_the_published_figure() -> None:
    assert published.gain(8.42, 0.07954) == pytest.approx(780.0, abs=0.05)
    assert published.gain(2.0, -0.3) == pytest.approx(200)  # text that became likelier earns nothing


def means(**values: tuple[float, float, float]) -> pd.DataFrame:
    return pd.DataFrame(values, index=[-1.0, 0.0, 1.0])


def test_transfer_is_the_mean_change_of_the_other_values() -> None:
    table = means(honesty=(0, 1, 5), courage=(0, 1, 1.5), care=(0, 2, 1))
    assert published.transfer(table, "honesty") == pytest.approx((0.5 + 1) / 2)


def test_clusters_are_ranked_by_how_much_more_than_the_target_they_move() -> None:
    line = np.array([-1.0, 0.5, 2.0])  # the target is a line, so it is its own prediction
    table = means(honesty=tuple(line), a=tuple(1.2 * line), b=tuple(1.4 * line + 3), c=(0.0, 0.0, 0.0))
    found = published.cluster_slopes(table, "honesty", {"a": "Agent", "b": "Agent", "c": "Assistant"})
    assert list(found["cluster"]) == ["Agent", "Assistant"]
    assert list(found["slope_less_1"]) == pytest.approx([0.3, -1.0])
    assert list(found["rank"]) == [1, 2]
    alone = published.cluster_slopes(table, "honesty", {"a": "Agent"})
    assert alone["slope_less_1"].item() == pytest.approx(0.2)


def test_steering_f1_equals_a_toy_by_hand() -> None:
    """Weights 0.5, 0.25, 0.25: the first is put right, the last put wrong; net 0.25.

    Controls 0.5 each: the second changes, arbitrary 0.5. P = 0.25 / 0.75 = 1/3, R = 1/4,
    F1 = 2 (1/12) / (7/12) = 2/7; choice mass 0.4 against 0.8 costs a factor of 1/4.
    """
    scores = pd.DataFrame({-1: [-3, 1, 1], 0: [-2.0, 1.0, 1.0], 1: [4.0, 1.0, -1.0]})
    controls = pd.DataFrame({-1: [1.0, -1.0], 0: [1.0, 1.0], 1: [2.0, 3.0]})
    found = published.steering_f1(scores, [controls, controls[:0]], {-1: 0.4, 0: 0.8, 1: 0.9})
    assert (found.correct, found.wrong, found.arbitrary) == (0.5, 0.25, 0.5)
    assert found.f1 == pytest.approx(100 * 2 / 7 / 4)
    assert not found.swapped
    turned = published.steering_f1(scores.rename(columns={1: -1, -1: 1}), [controls], {-1: 0.4, 0: 0.8, 1: 0.9})
    assert turned.swapped
    assert turned.f1 == pytest.approx(found.f1)
    assert published.steering_f1(scores, [controls], {-1: 0.04, 0: 0.8, 1: 0.9}).f1 is None
    without = published.steering_f1(scores, [controls[:0]] * 2, {-1: 0.4, 0: 0.8, 1: 0.9})
    assert without.f1 is None  # nothing to be arbitrary in
    # Of many sure sums one changes, of two tastes both: a domain that is unsure counts as much as one that is sure.
    sums, tastes = (
        pd.DataFrame({-1: low, 0: zero, 1: zero}) for low, zero in (([-9.0, 9, 9], [9.0, 9, 9]), ([-1], [1]))
    )
    assert published.steering_f1(scores, [sums, tastes], {-1: 1, 0: 1, 1: 1}).arbitrary == pytest.approx(1 / 3 + 1)
    nothing = published.steering_f1(
        scores[[0]].assign(**{"a": 0}).rename(columns={"a": -1}).assign(b=0).rename(columns={"b": 1}),
        [controls],
        {-1: 1, 0: 1, 1: 1},
    )
    assert nothing.f1 == 0


def test_symmetry_says_when_both_poles_move_the_same_way() -> None:
    assert symmetry(-1.0, 1.0, 2.0) == Symmetry(share=0.5, opposite=True)
    assert symmetry(3.0, 1.0, 3.0) == Symmetry(share=1.0, opposite=False)
    assert symmetry(1.0, 1.0, 1.0) == Symmetry(share=0.0, opposite=False)


def test_two_of_three_values_rise_or_fall_all_the_way() -> None:
    assert monotonic_share(means(a=(0, 1, 2), b=(3, 2, 1), c=(0, 2, 1))) == pytest.approx(2 / 3)


def test_flips_are_counted_by_direction() -> None:
    found = flips(pd.Series([-1.0, -1.0, 2.0, 2.0]), pd.Series([1.0, -2.0, -1.0, 3.0]))
    assert found == Flips(towards=1, away=1, items=4)


def test_coherent_needs_valid_rows_and_little_degradation() -> None:
    assert published.coherent(0.8, 0.9)
    assert not published.coherent(0.79, 0)
    assert not published.coherent(1.0, 1.0)
