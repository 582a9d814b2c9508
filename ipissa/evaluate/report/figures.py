"""The figures of a report, as matplotlib figures without global state."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ipissa.evaluate.methods import ADAPTER, METHODS

SHOWN_VALUES = 24


def yardstick_figure(table: pd.DataFrame) -> Figure:
    """Trait gain, plain gain and contrast of both poles, a row per method."""
    names = {"trait_gain": "trait gain", "plain_gain": "plain gain (nats)", "contrast": "contrast"}
    methods = list(dict.fromkeys(table["method"]))
    figure, axes = _figure(11, 1.2 + 0.45 * len(methods), columns=len(names))
    for axis, (name, title) in zip(axes, names.items(), strict=True):
        for pole, shift, colour in (("+", -0.14, "tab:blue"), ("-", 0.14, "tab:orange")):
            own = table[table["pole"] == pole].set_index("method").loc[methods]
            _intervals(axis, own[name], own[f"{name}_low"], own[f"{name}_high"], shift, colour, f"α = {pole}1")
        axis.axvline(0, color="grey", linewidth=0.8)
        _rows(axis, methods if axis is axes[0] else [""] * len(methods))
        axis.set_title(title)
    axes[-1].legend(loc="lower right", fontsize="small")
    return figure


def dose_figure(dose: pd.DataFrame) -> Figure:
    """Change of the balanced score over α, with 95 % intervals, and the choice mass below."""
    figure, (score, mass) = _figure(9, 7, rows=2)
    for method, own in _by_method(dose):
        line = score.errorbar(
            own["alpha"], own["change"], [own["change"] - own["low"], own["high"] - own["change"]],
            marker="o", markersize=4, capsize=2, label=method, color=_colour(method),
        )  # fmt: skip
        mass.plot(own["alpha"], own["choice_mass"], marker="o", markersize=4, color=line[0].get_color())
    score.axhline(0, color="grey", linewidth=0.8)
    score.set_ylabel("change of the balanced score (nats)")
    mass.set_ylabel("probability on Yes and No")
    mass.set_xlabel("α")
    score.legend(fontsize="small", ncols=2)
    return figure


def pareto_figure(points: pd.DataFrame) -> Figure:
    """Effect against degradation, a point per method and |α|, and the front from doing nothing on."""
    figure, (axis,) = _figure(9, 5.5)
    for method, own in _by_method(points):
        axis.scatter(own["degradation"], own["effect"], label=method, color=_colour(method), s=28)
        for row in own.itertuples():
            axis.annotate(f"{row.alpha:g}", (row.degradation, row.effect), fontsize=6, xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
    front = points[points["front"]].sort_values("degradation")
    axis.step(
        [0.0, *front["degradation"]], [0.0, *front["effect"]], where="post", color="black", linewidth=1,
        label="Pareto front",
    )  # fmt: skip
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_xlabel("text degradation (nats per token)")
    axis.set_ylabel("half of how far the poles move\nthe balanced score apart (nats)")
    axis.legend(fontsize="small", ncols=2)
    return figure


def values_figure(values: pd.DataFrame) -> Figure:
    """Slopes of the values that moved most, filled where they survive Holm's correction."""
    largest = values.reindex(values["value"].abs().sort_values().index)[-SHOWN_VALUES:]
    figure, (axis,) = _figure(8, 1.2 + 0.3 * len(largest))
    colours = np.where(largest["p_holm"] < 0.05, "tab:blue", "lightgrey")
    positions = np.arange(len(largest))
    axis.barh(positions, largest["value"], color=list(colours))
    axis.errorbar(
        largest["value"], positions, xerr=[largest["value"] - largest["low"], largest["high"] - largest["value"]],
        fmt="none", ecolor="black", elinewidth=0.8,
    )  # fmt: skip
    axis.set_yticks(positions, list(largest["name"]), fontsize=8)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_xlabel("balanced slope (nats per unit of α); blue: p < 0.05 after Holm")
    return figure


def clusters_figure(clusters: pd.DataFrame) -> Figure:
    """Slope less 1 per cluster and method, the methods with their own slope on the target."""
    methods = list(dict.fromkeys(clusters["method"]))
    table = clusters.pivot(index="cluster", columns="method", values="slope_less_1")[methods]
    own = clusters.groupby("method")["target_slope"].first()
    values = clusters.groupby("cluster")["values"].first()
    figure, (axis,) = _figure(9, 4)
    width = 0.8 / len(table.columns)
    for i, method in enumerate(table.columns):
        axis.bar(
            np.arange(len(table)) + i * width, table[method], width,
            label=f"{method} ({own[method]:+.3f})", color=_colour(method),
        )  # fmt: skip
    names = [f"{cluster} (values: {values[cluster]})" for cluster in table.index]
    axis.set_xticks(np.arange(len(table)) + 0.4 - width / 2, names)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_ylabel("slope on the target's line, less 1")
    axis.legend(fontsize="small", ncols=2)
    return figure


def null_figure(random: pd.DataFrame, measured: float) -> Figure:
    """Slopes of random adapters, and the measured one."""
    figure, (axis,) = _figure(7, 3)
    axis.hist(random["value"], bins=max(5, len(random) // 2), color="lightgrey", edgecolor="grey")
    axis.axvline(measured, color="tab:blue", label="measured")
    axis.set_xlabel("balanced slope of random adapters (nats per unit of α)")
    axis.legend()
    return figure


def _figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _intervals(
    axis: Axes, values: pd.Series, low: pd.Series, high: pd.Series, shift: float, colour: str, label: str
) -> None:
    positions = np.arange(len(values)) + shift
    axis.errorbar(
        values, positions, xerr=[values - low, high - values], fmt="o", markersize=4, color=colour, label=label
    )


def _rows(axis: Axes, names: list[str]) -> None:
    axis.set_yticks(np.arange(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)


def _by_method(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(str(method), own) for method, own in table.groupby("method", sort=False)]


def _colour(method: str) -> object:
    """The same colour for a method in every figure."""
    index = [ADAPTER, *METHODS].index(method)
    return colormaps["tab20"]((2 * index) % 20 + (index // 10) % 2)  # strong colours first, then their pale halves
