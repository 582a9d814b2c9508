"""What is compared with what, in which order, and what is left out of it and why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ipissa.data.items import Dataset
from ipissa.errors import ConfigError
from ipissa.evaluate.analysis import Analysis, analyse, base_differences, ranked, why_unranked
from ipissa.evaluate.compare import Degradation, Measured
from ipissa.evaluate.methods import ADAPTER
from ipissa.evaluate.report.page import verdict
from ipissa.evaluate.report.tables import pareto_table


def test_methods_that_do_not_start_from_the_same_model_are_not_ranked(
    measured: list[Measured], dataset: Dataset
) -> None:
    analyses = [analyse(each, dataset) for each in measured]
    differences = base_differences(measured)
    assert max(differences.values()) < 1e-3
    slopes = {each.method: each.figures["balanced_value"] for each in analyses}
    up, down = (
        [each.method for each in analyses if each.figures["balanced_p"] < 0.05 and sign * slopes[each.method] > 0]
        for sign in (1, -1)
    )
    said = f"Intervals over dilemmas above 0: {', '.join(up) or 'none'}; below 0: {', '.join(down) or 'none'}."
    assert said in verdict(measured, analyses)
    matched = [each.method for each in measured if each.equal]
    assert ADAPTER in matched
    assert "prompt" not in matched
    assert ranked(analyses, differences) == sorted(matched, key=lambda name: -slopes[name])
    rows = measured[2].rows
    assert rows is not None
    for nats, says in ((0.6, "more than half a nat"), (0.2, "differ from the adapter's by up to 0.20 nats")):
        other = replace(measured[2], rows=rows.assign(log_odds=rows["log_odds"] + nats))
        shifted = [*measured[:2], other, *measured[3:]]
        assert says in verdict(shifted, analyses)
        assert verdict(shifted, analyses).startswith("Not ranked: at α = 0 the answers with caa differ")
        with pytest.raises(ConfigError, match="Not ranked"):
            ranked(analyses, base_differences(shifted))
    assert why_unranked({"a": 0.0, "b": float("nan")}) is not None


def test_an_alpha_at_which_answers_are_lost_has_no_point_and_costs_no_report(
    measured: list[Measured], dataset: Dataset
) -> None:
    first = measured[0]
    assert first.rows is not None
    broken = first.rows.assign(valid=first.rows["valid"] & (first.rows["alpha"] != 0.5))
    found = analyse(replace(first, rows=broken), dataset)
    dose = found.dose.set_index("alpha")
    assert dose.loc[0.5, ["change", "low", "high"]].isna().all()
    assert dose.loc[[-1.0, 0.0, 1.0], "change"].notna().all()
    assert found.figures["valid"] == analyse(first, dataset).figures["valid"]  # that of the poles
    assert list(pareto_table([found], [first])["alpha"]) == [1.0]


def test_clusters_are_compared_only_with_a_slope_that_can_be_told_from_0(
    measured: list[Measured], dataset: Dataset
) -> None:
    first = measured[0]
    assert first.rows is not None
    labels = first.rows["item"].map({i: item.labels.get("honesty", 0) for i, item in enumerate(dataset.items)})
    moved = first.rows["alpha"] * labels

    def clusters(shift: pd.Series) -> pd.DataFrame:
        return analyse(replace(first, rows=first.rows.assign(log_odds=shift)), dataset).clusters

    noise = pd.Series(np.random.default_rng(0).normal(scale=0.1, size=len(moved)), index=moved.index)
    found = clusters(moved + noise)
    assert set(found["cluster"]) == {"Assistant"}  # of kindness, the only other value of a cluster
    assert found["target_slope"].item() == pytest.approx(1, abs=0.1)
    assert clusters(noise).empty


def test_methods_at_another_cost_are_named_and_not_ranked(measured: list[Measured], dataset: Dataset) -> None:
    some = [replace(each, equal=False) if each.method == "caa" else each for each in measured]
    analyses = [analyse(each, dataset) for each in some]
    assert set(ranked(analyses, base_differences(some))) == {"adapter", "random"}
    left = {each.method: each.cost() for each in some if each.method in ("prompt", "caa")}
    own = f"the adapter {measured[0].cost():.3f}"
    said = ", ".join(f"{method} (costs text {cost:.3f} nats per token, {own})" for method, cost in left.items())
    assert f"Not ranked, as not brought to the adapter's degradation: {said}." in verdict(some, analyses)


def test_methods_that_lost_dilemmas_are_named_and_not_ranked(measured: list[Measured], dataset: Dataset) -> None:
    some = [replace(each, equal=True) for each in measured]
    rows = some[2].rows
    assert rows is not None
    of_one = rows["dilemma"] == dataset.items[0].dilemma
    some[2] = replace(some[2], rows=rows.assign(valid=rows["valid"] & ~of_one))
    analyses = [analyse(each, dataset) for each in some]
    kept = analyses[2].figures["kept"]
    assert kept == analyses[2].figures["items"] / analyses[0].figures["items"] < 0.9
    assert set(ranked(analyses, base_differences(measured))) == {each.method for each in some} - {some[2].method}
    assert f"Not ranked, as too many items lost their answer: {some[2].method} ({kept:.0%} kept one)" in verdict(
        [each if each is not some[2] else replace(measured[2], equal=True) for each in some], analyses
    )


def test_where_every_method_lost_dilemmas_nothing_is_ranked(measured: list[Measured], dataset: Dataset) -> None:
    some = []
    for each in measured:
        assert each.rows is not None
        of_one = each.rows["dilemma"] == dataset.items[0].dilemma
        some.append(replace(each, equal=True, rows=each.rows.assign(valid=each.rows["valid"] & ~of_one)))
    text = verdict(some, [analyse(each, dataset) for each in some])
    assert text.startswith("Nothing is ranked: no method at equal degradation kept an answer to enough dilemmas.")


def test_an_adapter_that_costs_nothing_has_a_verdict(measured: list[Measured], dataset: Dataset) -> None:
    free = [Degradation(each.alpha, 0.0, None) for each in measured[0].degradation]
    some = [replace(measured[0], degradation=free), *measured[1:]]
    assert "nats per token, the adapter 0.000)" in verdict(some, [analyse(each, dataset) for each in some])


def test_the_front_holds_what_neither_another_point_nor_doing_nothing_beats(
    measured: list[Measured], dataset: Dataset
) -> None:
    def at_poles(method: str, changes: tuple[float, float], lost: tuple[float, float]) -> tuple[Analysis, Measured]:
        effects = pd.DataFrame({"alpha": [1.0], "effect": [(changes[1] - changes[0]) / 2], "kept": [1.0]})
        costs = [Degradation(alpha, text, None) for alpha, text in zip((-1.0, 1.0), lost, strict=True)]
        own = analyse(measured[0], dataset)
        return replace(own, method=method, effects=effects), replace(measured[0], method=method, degradation=costs)

    made = [
        at_poles("apart", (-0.3, 0.5), (0.1, 0.3)),
        at_poles("dearer", (-0.3, 0.3), (0.3, 0.3)),
        at_poles("further", (-1.0, 1.0), (0.5, 0.5)),
        at_poles("alike", (-0.6, -0.6), (0.0, 0.1)),  # lower at both poles: no effect of the dial
        at_poles("backwards", (0.2, -0.2), (0.01, 0.01)),
    ]
    points = pareto_table(*map(list, zip(*made, strict=True))).set_index("method")
    assert list(points["effect"]) == pytest.approx([0.4, 0.3, 1.0, 0.0, -0.2])
    assert list(points["degradation"]) == pytest.approx([0.2, 0.3, 0.5, 0.05, 0.01])
    assert list(points.index[points["front"]]) == ["apart", "further"]


def test_points_of_one_alpha_are_over_the_same_items_and_those_that_lost_many_are_not_on_the_front(
    measured: list[Measured], dataset: Dataset
) -> None:
    """Dilemmas that move by as much as their number says; those from the fifth on lose their answer at +1 only."""
    first = measured[0]
    assert first.rows is not None
    labels = {i: item.labels["honesty"] for i, item in enumerate(dataset.items) if "honesty" in item.labels}
    rows = first.rows[first.rows["item"].isin(labels)]
    moved = pd.Series(pd.factorize(rows["dilemma"])[0], index=rows.index)
    rows = rows.assign(log_odds=rows["item"].map(labels) * moved * rows["alpha"], valid=True)
    whole = replace(first, rows=rows)
    lost = replace(first, method="caa", rows=rows.assign(valid=(rows["alpha"] != 1) | (moved < 4)))
    points = pareto_table([analyse(each, dataset) for each in (whole, lost)], [whole, lost])
    at_one = points[points["alpha"] == 1]
    of_items = moved[rows["alpha"] == 0]
    left = of_items[of_items < 4]
    assert list(at_one["effect"]) == pytest.approx([of_items.mean(), left.mean()])
    assert list(at_one["kept"]) == pytest.approx([1, len(left) / len(of_items)])
    assert not at_one.loc[at_one["method"] == "caa", "front"].item()
