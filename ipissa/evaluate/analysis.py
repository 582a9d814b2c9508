"""From what was measured in dilemmas to the figures of a report: one method at a time, and side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from ipissa.data.items import CONTROLS, Dataset
from ipissa.errors import ConfigError
from ipissa.evaluate import published
from ipissa.evaluate.choices import complete
from ipissa.evaluate.clusters import clusters_of
from ipissa.evaluate.compare import Measured
from ipissa.evaluate.response import flips, monotonic_share, symmetry
from ipissa.evaluate.slopes import (
    balanced_slope,
    can_be_balanced,
    dilemmas_of_the_rarer,
    plain_slope,
    value_slopes,
    with_labels,
)

POLES = (-1.0, 0.0, 1.0)
MIN_KEPT = 0.9  # of the target's items; methods that lost more of them answer other questions than the rest
SAME_BASE_NATS = 0.1  # log-odds at α = 0; in bfloat16, batches of another size round by as much as half of it
WARN_NATS = 0.5


class TooFewAnswersError(ConfigError):
    """A method leaves too few dilemmas an answer to say anything of it."""


@dataclass(frozen=True)
class Analysis:
    """What one method does in dilemmas.

    Args:
        figures: One row of the table of methods.
        dose: Per α: change of the balanced score since α = 0 with its interval (NaN where too few answers are left),
            the share of the target's items that it is of, choice mass, valid share.
        effects: Per |α|: half of how far the poles move the balanced score apart, over the items with an answer at
            both of them and at 0, and the share that these are of the target's.
        values: Per value: slope and interval, p corrected, and how far its labels are the target's.
        clusters: Slope less 1 per cluster, ranked, and the target's own slope that they are measured by; none where
            that slope cannot be told from 0.
    """

    method: str
    figures: dict[str, Any]
    dose: pd.DataFrame
    effects: pd.DataFrame
    values: pd.DataFrame
    clusters: pd.DataFrame


def analyse(measured: Measured, dataset: Dataset) -> Analysis:
    """Every figure of a method; its rows must be there.

    Raises:
        TooFewAnswersError: too few dilemmas have an answer at every α.
    """
    assert measured.rows is not None
    # Every method has the poles, prompts too; the other α are for the dose response.
    rows = complete(at_poles(measured.rows))
    labels = item_labels(dataset)
    target = with_labels(rows, labels[dataset.target])
    if not can_be_balanced(target):
        raise TooFewAnswersError(
            f"With {measured.method} {target['dilemma'].nunique()} dilemmas about {dataset.target!r} have an answer at "
            f"α = -1, 0 and 1, only {dilemmas_of_the_rarer(target)} of them of the rarer label; use more items."
        )
    values = value_slopes(rows, labels).merge(label_overlap(labels, dataset.target), on="name")
    means = value_means(rows, labels)
    figures = {
        "method": measured.method,
        "scale": measured.scale,
        "equal": measured.equal,
        "items": int(target["item"].nunique()),
        "kept": target["item"].nunique() / len(labels[dataset.target]),
        **_slopes(target),
        **_published(target, means, rows, measured, dataset),
        **_shape(target, means, dataset.target),
        "valid": float(at_poles(measured.rows)["valid"].mean()),
        "choice_mass": float(rows.loc[rows["alpha"] == 0, "choice_mass"].mean()),
    }
    asked = with_labels(measured.rows, labels[dataset.target])  # at every α, whether it has an answer or not
    clusters = published.cluster_slopes(means, dataset.target, clusters_of(means.columns))
    return Analysis(
        measured.method,
        figures,
        _dose(asked, measured.rows),
        _effects(asked),
        values,
        # A ratio to a slope that may as well be 0 says nothing.
        clusters.assign(target_slope=figures["balanced_value"]).loc[[way(figures) != 0] * len(clusters)],
    )


def way(figures: Mapping[str, Any]) -> int:
    """+1 where the interval of the balanced slope is above 0, -1 where it is below, else 0."""
    return int(figures["balanced_low"] > 0) - int(figures["balanced_high"] < 0)


def at_poles(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows at α = -1, 0 and 1."""
    return rows[rows["alpha"].isin(POLES)]


def item_labels(dataset: Dataset) -> dict[str, dict[int, int]]:
    """Per value, the label of every item that has one; the target first."""
    return {
        value: {i: item.labels[value] for i, item in enumerate(dataset.items) if value in item.labels}
        for value in dataset.values
    }


def label_overlap(labels: Mapping[str, Mapping[int, int]], target: str) -> pd.DataFrame:
    """Per value, how many items it shares with the target, and on which part of them it has the target's label.

    A value that agrees everywhere moves with the target by its labels alone, one that agrees nowhere against it.
    """
    found = []
    for value, own in labels.items():
        same = [label == labels[target][item] for item, label in own.items() if item in labels[target]]
        found.append({"name": value, "shared": len(same), "agree": sum(same) / len(same) if same else math.nan})
    return pd.DataFrame(found)


def value_means(rows: pd.DataFrame, labels: Mapping[str, Mapping[int, int]]) -> pd.DataFrame:
    """Mean of l y per value that has labels of either kind, (α, value), negated once.

    Either kind weighs half, however many items it has: otherwise a taste for Yes would pass for the commoner one.
    """
    scored = {value: with_labels(rows, by_item) for value, by_item in labels.items()}
    return pd.DataFrame(
        {
            value: (own["log_odds"] * own["label"]).groupby([own["alpha"], own["label"]]).mean().unstack().mean(axis=1)
            for value, own in scored.items()
            if own["label"].nunique() == 2
        }
    )


def _slopes(target: pd.DataFrame) -> dict[str, Any]:
    balanced = balanced_slope(target)
    return {
        **{f"balanced_{name}": value for name, value in asdict(balanced.trait).items()},
        **{f"acquiescence_{name}": getattr(balanced.acquiescence, name) for name in ("value", "t", "p")},
        **{f"plain_{name}": getattr(plain_slope(target), name) for name in ("value", "t", "p")},
    }


def _published(
    target: pd.DataFrame, means: pd.DataFrame, rows: pd.DataFrame, measured: Measured, dataset: Dataset
) -> dict[str, Any]:
    once = target["log_odds"] * target["label"]
    prompt = {each.alpha: each.prompt for each in measured.degradation}
    degradation = prompt.get(1.0) or 0.0
    found: dict[str, Any] = {"prompt_degradation": degradation}
    for name, score in (("once_negated", once), ("published", once * target["side"])):
        effect = published.effect(score, target["alpha"])
        found |= {f"{name}_{key}": value for key, value in asdict(effect).items()}
        found[f"{name}_gain"] = published.gain(effect.effect, degradation)
    asked = at_poles(measured.rows)
    mass = asked.groupby("alpha")["choice_mass"].mean()  # also of items whose answer was lost at a pole
    return found | {
        "transfer": published.transfer(means, dataset.target),
        "coherent": published.coherent(float(asked["valid"].mean()), degradation),
        **{f"steering_{key}": value for key, value in asdict(_f1(target, rows, dataset, mass)).items()},
    }


def _f1(target: pd.DataFrame, rows: pd.DataFrame, dataset: Dataset, mass: pd.Series) -> published.SteeringF1:
    controls = [_by_item(with_labels(rows, _labels_of(dataset, domain))) for domain in CONTROLS]
    return published.steering_f1(_by_item(target), controls, {int(alpha): mass[alpha] for alpha in POLES})


def _labels_of(dataset: Dataset, domain: str) -> dict[int, int]:
    """The labels of a domain's items, whatever value they are of."""
    return {i: label for i, item in enumerate(dataset.items) if item.domain == domain for label in item.labels.values()}


def _by_item(rows: pd.DataFrame) -> pd.DataFrame:
    """l y per item, columns -1, 0 and 1."""
    scored = rows.assign(score=lambda r: r["log_odds"] * r["label"])
    table = scored.pivot(index="item", columns="alpha", values="score").reindex(columns=POLES)
    return table.set_axis([int(alpha) for alpha in POLES], axis=1)


def _shape(target: pd.DataFrame, means: pd.DataFrame, name: str) -> dict[str, Any]:
    shape = symmetry(*means.loc[list(POLES), name].tolist())
    scores = _by_item(target)
    up, down = flips(scores[0], scores[1]), flips(scores[0], scores[-1])
    return {
        "symmetry": shape.share,
        "opposite": shape.opposite,
        "dose_monotonic": monotonic_share(means.sort_index()),
        "flips_towards_at_plus": up.towards,
        "flips_away_at_plus": up.away,
        "flips_towards_at_minus": down.towards,
        "flips_away_at_minus": down.away,
    }


def _dose(target: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    found = []
    for alpha, own in rows.groupby("alpha"):
        answered = complete(target[target["alpha"].isin([0.0, alpha])])
        point = {"alpha": alpha, "change": 0.0, "low": 0.0, "high": 0.0, "kept": _kept(answered, target)}
        if alpha != 0 and not can_be_balanced(answered):
            point |= dict.fromkeys(("change", "low", "high"), math.nan)
        elif alpha != 0:
            slope = balanced_slope(answered).trait
            # A slope over 0 and α, times α, is the change between them.
            low, high = sorted((slope.low * alpha, slope.high * alpha))
            point |= {"change": slope.value * alpha, "low": low, "high": high}
        found.append({**point, "choice_mass": own["choice_mass"].mean(), "valid": own["valid"].mean()})
    return pd.DataFrame(found)


def _effects(target: pd.DataFrame) -> pd.DataFrame:
    """Both poles of one |α| over the same items: a change since 0 of either is over those that it has itself."""
    asked = set(target["alpha"])
    found = []
    for alpha in sorted(alpha for alpha in asked if alpha > 0 and -alpha in asked):
        answered = complete(target[target["alpha"].isin([-alpha, 0.0, alpha])])
        effect = balanced_slope(answered).trait.value * alpha if can_be_balanced(answered) else math.nan
        found.append({"alpha": alpha, "effect": effect, "kept": _kept(answered, target)})
    return pd.DataFrame(found, columns=["alpha", "effect", "kept"])


def _kept(answered: pd.DataFrame, target: pd.DataFrame) -> float:
    """The share of the target's items that has an answer at every α of some."""
    return answered["item"].nunique() / target["item"].nunique()


def base_differences(measured: Sequence[Measured]) -> dict[str, float]:
    """Per method, how far log-odds at α = 0 are from the first method's, in nats, on average over items."""

    def at_zero(each: Measured) -> pd.Series:
        assert each.rows is not None
        return each.rows[each.rows["alpha"] == 0].set_index("item")["log_odds"]

    first = at_zero(measured[0])
    return {each.method: float((at_zero(each) - first).abs().mean()) for each in measured}


def why_unranked(differences: Mapping[str, float]) -> str | None:
    """Why methods must not be ranked, or None if all are the same model at α = 0."""
    off = {method: nats for method, nats in differences.items() if not nats <= SAME_BASE_NATS}
    if not off:
        return None
    worst = max(off, key=lambda method: np.nan_to_num(off[method], nan=np.inf))
    loud = " That is more than half a nat: they were not measured on the same model." if off[worst] > WARN_NATS else ""
    return (
        f"Not ranked: at α = 0 the answers with {', '.join(sorted(off))} differ from the adapter's by up to "
        f"{off[worst]:.2f} nats on average, so they do not start from the same model.{loud}"
    )


def asked_as_the_adapter(analysis: Analysis) -> bool:
    """Whether so many dilemmas kept an answer that a method can be compared with another over all of them."""
    return analysis.figures["kept"] >= MIN_KEPT


def ranked(analyses: Sequence[Analysis], differences: Mapping[str, float]) -> list[str]:
    """Methods that cost text what the adapter costs and answer what it was asked, by balanced slope, largest first.

    Raises:
        ConfigError: they do not start from the same model.
    """
    reason = why_unranked(differences)
    if reason:
        raise ConfigError(reason)
    matched = [each for each in analyses if each.figures["equal"] is True and asked_as_the_adapter(each)]
    return [each.method for each in sorted(matched, key=lambda each: -each.figures["balanced_value"])]
