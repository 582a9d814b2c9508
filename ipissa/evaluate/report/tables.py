"""The tables of a report, as data frames; each is also written as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from ipissa.evaluate.analysis import Analysis
from ipissa.evaluate.compare import Measured

YARDSTICKS = ("trait_gain", "plain_gain", "contrast")


def yardstick_table(measured: Sequence[Measured]) -> pd.DataFrame:
    """A row per method and pole: every yardstick with its interval and t."""
    found = []
    for each in measured:
        for pole, side in (("+", each.yardsticks.positive), ("-", each.yardsticks.negative)):
            row: dict[str, object] = {"method": each.method, "scale": each.scale, "equal": each.equal, "pole": pole}
            for name in YARDSTICKS:
                estimate = getattr(side, name)
                row |= {name: estimate.value} | {
                    f"{name}_{key}": getattr(estimate, key) for key in ("low", "high", "t")
                }
            found.append(row)
    return pd.DataFrame(found).astype({"scale": float})  # NaN, shown as nothing, where there is none


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
    points = dose[dose["alpha"] != 0].assign(
        effect=lambda t: t["change"] * t["alpha"].map(lambda alpha: 1 if alpha > 0 else -1),
        degradation=lambda t: [
            float(lost[method, alpha]) for method, alpha in zip(t["method"], t["alpha"], strict=True)
        ],
    )[["method", "alpha", "effect", "degradation"]]
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
