"""The tables of a report, as data frames; each is also written as CSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import pandas as pd

from ipissa.evaluate.analysis import Analysis
from ipissa.evaluate.best_scale import Best
from ipissa.evaluate.compare import Measured
from ipissa.evaluate.yardsticks import Yardsticks

YARDSTICKS = ("trait_gain", "plain_gain", "contrast")


def yardstick_table(measured: Sequence[Measured]) -> pd.DataFrame:
    """A row per method and pole: every yardstick with its interval and t."""
    found = [
        {"method": each.method, "scale": each.scale, "equal": each.equal} | row
        for each in measured
        for row in _of_poles(each.yardsticks)
    ]
    return pd.DataFrame(found).astype({"scale": float})  # NaN, shown as nothing, where there is none


def best_table(best: Sequence[Best]) -> pd.DataFrame:
    """The same at the scale that suits a method best."""
    return pd.DataFrame(
        [
            {"method": each.method, "scale": each.scale, "degradation": each.degradation} | row
            for each in best
            for row in _of_poles(each.yardsticks)
        ]
    )


def _of_poles(yardsticks: Yardsticks) -> Iterator[dict[str, object]]:
    for pole, side in (("+", yardsticks.positive), ("-", yardsticks.negative)):
        row: dict[str, object] = {"pole": pole}
        for name in YARDSTICKS:
            estimate = getattr(side, name)
            row |= {name: estimate.value} | {f"{name}_{key}": getattr(estimate, key) for key in ("low", "high", "t")}
        yield row


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
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def pareto_table(analyses: Sequence[Analysis], measured: Sequence[Measured]) -> pd.DataFrame:
    """A row per method and α other than 0: how far the trait moved the right way, and what text lost for it.

    `front` marks points that no other one beats in both.
    """
    lost = degradation_table(measured).set_index(["method", "alpha"])["text"]
    dose = stacked(analyses, "dose")
    points = (
        dose[dose["alpha"] != 0]
        .dropna(subset=["change"])
        .assign(
            effect=lambda t: t["change"] * t["alpha"].map(lambda alpha: 1 if alpha > 0 else -1),
            degradation=lambda t: [
                float(lost[method, alpha]) for method, alpha in zip(t["method"], t["alpha"], strict=True)
            ],
        )[["method", "alpha", "effect", "degradation"]]
    )
    beaten = [
        bool(
            (
                (points["effect"] >= row.effect)
                & (points["degradation"] <= row.degradation)
                & ((points["effect"] > row.effect) | (points["degradation"] < row.degradation))
            ).any()
        )
        for row in points.itertuples()
    ]
    return points.assign(front=[not each for each in beaten]).reset_index(drop=True)
