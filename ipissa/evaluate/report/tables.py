"""The tables of a report, as data frames; each is also written as CSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import pandas as pd

from ipissa.evaluate.analysis import MIN_KEPT, Analysis
from ipissa.evaluate.best_scale import Best
from ipissa.evaluate.compare import Measured
from ipissa.evaluate.echoes import Echoes, trait_gain_without
from ipissa.evaluate.methods import ADAPTER
from ipissa.evaluate.yardsticks import Estimate, Yardsticks, trait_gain_above

YARDSTICKS = ("trait_gain", "plain_gain", "contrast")


def yardstick_table(measured: Sequence[Measured], echoes: Echoes) -> pd.DataFrame:
    """A row per method and pole: what its text costs there, every yardstick with its interval and t, the trait gain
    without texts that repeat the persona line, and the paired difference to the adapter's trait gain.
    """
    adapter = next((each.yardsticks for each in measured if each.method == ADAPTER), None)
    found = [
        {
            "method": each.method,
            "scale": each.scale,
            "equal": each.equal,
            "degradation": each.cost(float(f"{row['pole']}1")),
            **row,
        }
        for each in measured
        for row in _of_poles(each.yardsticks, adapter, echoes)
    ]
    return pd.DataFrame(found).astype({"scale": float})  # NaN, shown as nothing, where there is none


def best_table(best: Sequence[Best], adapter: Yardsticks, echoes: Echoes) -> pd.DataFrame:
    """The same at the scale that suits a method best, beside the adapter at |α| = 1."""
    return pd.DataFrame(
        [
            {"method": each.method, "scale": each.scale, "degradation": each.degradation} | row
            for each in best
            for row in _of_poles(each.yardsticks, adapter, echoes)
        ]
    )


def _of_poles(yardsticks: Yardsticks, adapter: Yardsticks | None, echoes: Echoes) -> Iterator[dict[str, object]]:
    """`adapter_more` is the adapter's trait gain less this one, with its interval over prompts that both have."""
    for pole, name in (("+", "positive"), ("-", "negative")):
        side = getattr(yardsticks, name)
        row: dict[str, object] = {"pole": pole}
        for figure in YARDSTICKS:
            row |= _cells(figure, getattr(side, figure))
        if side.by_prompt is not None:
            row |= _cells("without_echoes", trait_gain_without(side, echoes[pole]))
        if adapter is not None and adapter is not yardsticks and side.by_prompt is not None:
            row |= _cells("adapter_more", trait_gain_above(getattr(adapter, name), side))
        yield row


def _cells(name: str, estimate: Estimate) -> dict[str, object]:
    return {name: estimate.value} | {f"{name}_{key}": getattr(estimate, key) for key in ("low", "high", "t")}


def degradation_table(measured: Sequence[Measured]) -> pd.DataFrame:
    """A row per method and α: nats per token that text and questions lose."""
    return pd.DataFrame([{"method": each.method, **asdict(point)} for each in measured for point in each.degradation])


def method_table(analyses: Sequence[Analysis]) -> pd.DataFrame:
    """A row per method with every figure of its dilemmas."""
    return pd.DataFrame([each.figures for each in analyses]).astype({"scale": float})


def stacked(analyses: Sequence[Analysis], name: str) -> pd.DataFrame:
    """A table that every analysis has (`dose`, `values`, `clusters`), with the method in front."""
    parts = []
    for each in analyses:
        table = getattr(each, name).copy()
        table.insert(0, "method", each.method)
        parts.append(table)
    filled = [part for part in parts if not part.empty]
    return pd.concat(filled, ignore_index=True) if filled else parts[0]


def pareto_table(analyses: Sequence[Analysis], measured: Sequence[Measured]) -> pd.DataFrame:
    """A row per method and |α|: how far the poles moved the score apart, the right way, and what text lost for it.

    effect = (score at +|α| - score at -|α|) / 2, degradation the mean of both: what moves the score alike at both
    poles is no effect of a dial. `front` marks effects that neither another point nor doing nothing, (0, 0), has for
    as little, of methods that kept an answer to what the others were asked.
    """
    cost = {each.method: each.cost for each in measured}
    effects = stacked(analyses, "effects").dropna(subset=["effect"]).reset_index(drop=True)
    found = effects.assign(
        degradation=[cost[row.method](row.alpha, -row.alpha) for row in effects.itertuples(index=False)]
    )[["method", "alpha", "effect", "degradation", "kept"]]
    points = list(zip(found["effect"], found["degradation"], strict=True))
    asked_alike = found["kept"] >= MIN_KEPT
    rivals = [(0.0, 0.0), *(point for point, alike in zip(points, asked_alike, strict=True) if alike)]
    return found.assign(
        front=[alike and not _beaten(point, rivals) for point, alike in zip(points, asked_alike, strict=True)]
    )


def _beaten(point: tuple[float, float], rivals: Sequence[tuple[float, float]]) -> bool:
    """Whether a rival has as much effect for as little degradation, and more of one or less of the other."""
    effect, degradation = point
    return any(other != point and other[0] >= effect and other[1] <= degradation for other in rivals)
