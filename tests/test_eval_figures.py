"""What is drawn is what the tables hold: every point, interval and bar."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import BarContainer, ErrorbarContainer

from ipissa.evaluate.report import figures


def test_the_dose_response_has_every_point_with_its_interval() -> None:
    dose = pd.DataFrame(
        {
            "method": ["adapter"] * 3 + ["caa"] * 3,
            "alpha": [-1.0, 0.0, 1.0] * 2,
            "change": [-0.5, 0.0, 0.7, 0.1, 0.0, 0.2],
            "low": [-0.8, 0.0, 0.6, -0.2, 0.0, 0.1],
            "high": [-0.4, 0.0, 0.9, 0.3, 0.0, 0.5],
            "choice_mass": [0.9, 0.8, 0.7, 0.6, 0.8, 0.5],
        }
    )
    score, mass = figures.dose_figure(dose).axes
    drawn = [each for each in score.containers if isinstance(each, ErrorbarContainer)]
    assert [each.get_label() for each in drawn] == ["adapter", "caa"]
    for each, line, (_, own) in zip(drawn, mass.lines, dose.groupby("method", sort=False), strict=True):
        (bars,) = each.lines[2]
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        assert each.lines[0].get_ydata() == pytest.approx(own["change"].to_numpy())
        assert ends == pytest.approx(own[["low", "high"]].to_numpy())
        assert line.get_ydata() == pytest.approx(own["choice_mass"].to_numpy())


def test_effect_against_degradation_has_every_method_and_the_front_from_nothing_on() -> None:
    points = pd.DataFrame(
        {
            "method": ["adapter", "adapter", "caa"],
            "alpha": [0.5, 1.0, 1.0],
            "degradation": [0.1, 0.3, 0.2],
            "effect": [0.4, 0.6, 0.1],
            "front": [True, True, False],
        }
    )
    (axis,) = figures.pareto_figure(points).axes
    drawn = {each.get_label(): each.get_offsets().tolist() for each in axis.collections}
    assert drawn == {"adapter": [[0.1, 0.4], [0.3, 0.6]], "caa": [[0.2, 0.1]]}
    (front,) = (line for line in axis.lines if line.get_label() == "Pareto front")
    assert (list(front.get_xdata()), list(front.get_ydata())) == ([0.0, 0.1, 0.3], [0.0, 0.4, 0.6])


def test_values_that_survive_correction_are_filled() -> None:
    values = pd.DataFrame(
        {
            "name": ["candour", "care", "thrift"],
            "value": [0.4, -0.9, 0.1],
            "low": [0.3, -1.2, -0.1],
            "high": [0.5, -0.6, 0.3],
            "p_holm": [0.04, 0.06, 0.9],
        }
    )
    (axis,) = figures.values_figure(values).axes
    bars = next(each for each in axis.containers if isinstance(each, BarContainer))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["thrift", "candour", "care"]
    assert [bar.get_width() for bar in bars] == [0.1, 0.4, -0.9]
    colours = [tuple(bar.get_facecolor()) for bar in bars]
    assert colours[0] == colours[2] != colours[1]  # candour alone


def test_clusters_have_a_bar_per_method_and_the_slope_they_are_measured_by() -> None:
    clusters = pd.DataFrame(
        {
            "method": ["adapter", "adapter", "caa"],
            "cluster": ["Agent", "Assistant", "Agent"],
            "slope_less_1": [0.3, -1.0, 0.5],
            "values": [2, 1, 2],
            "target_slope": [0.25, 0.25, -0.5],
        }
    )
    (axis,) = figures.clusters_figure(clusters).axes
    drawn = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axis.containers}
    assert drawn["adapter (+0.250)"] == [0.3, -1.0]
    assert drawn["caa (-0.500)"][0] == 0.5
    assert np.isnan(drawn["caa (-0.500)"][1])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["Agent (values: 2)", "Assistant (values: 1)"]
