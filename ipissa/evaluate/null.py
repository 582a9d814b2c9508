"""What chance alone does: random adapters that cost as much as the one that was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from ipissa.data.items import Dataset
from ipissa.evaluate.analysis import item_labels
from ipissa.evaluate.baselines.random import random_like
from ipissa.evaluate.choices import complete, measure_choices
from ipissa.evaluate.compare import scale_to
from ipissa.evaluate.dial import ScaledDial
from ipissa.evaluate.methods import Materials, attached
from ipissa.evaluate.slopes import Slope, value_slopes
from ipissa.evaluate.steerer import Steerer

ALPHAS = (-1.0, 0.0, 1.0)
USABLE = "could be brought to that cost with enough answers left"
DRAWS = 100_000  # of one slope per seed, where there are more ways to take one


@dataclass(frozen=True)
class NullCheck:
    """Where a slope falls among those of random adapters that cost as much."""

    seeds: int
    left_out: int  # random adapters that could not be brought to that cost, or left too few answers
    median_t: float  # of |t|
    largest_slope: float  # of |slope|
    share_below: float  # of random |slopes| below the measured one
    p: float  # (1 + random ones at least as large) / (1 + seeds)

    def sentence(self) -> str:
        """For the report."""
        if not self.seeds:
            return f"None of {self.left_out} random adapters {USABLE}: nothing is said of chance."
        return (
            f"Of {self.seeds} random adapters that cost text as much, {self.share_below:.0%} move the balanced score "
            f"less (p against them {self.p:.3f}, of so few at least {1 / (1 + self.seeds):.3f}); their |t| has a "
            f"median of {self.median_t:.2f}, and the largest slope is {self.largest_slope:.3f} nats."
            + (f" {self.left_out} more are left out: none of them {USABLE}." if self.left_out else "")
        )


def null_slopes(
    m: Materials, dataset: Dataset, *, degradation: float, seed: int, start: float = 1.0
) -> list[dict[str, Any]]:
    """The balanced slopes of one random adapter, brought to `degradation`, over α in -1, 0 and 1; a row per value.

    `equal` says whether it was brought there and the target could still be measured, which has a row even if not.

    Args:
        start: A scale to begin the search for its own with.
    """
    with attached(m.model, random_like(m.innerpissa(), m.model, seed=seed)) as steerer:
        match = scale_to(degradation, steerer, m, start=start)
        rows = measure_choices(Steerer(ScaledDial(steerer.dial, match.scale)), m.tokenizer, dataset, ALPHAS)
    slopes = {each["name"]: each for each in value_slopes(complete(rows), item_labels(dataset)).to_dict("records")}
    own = {"seed": seed, "scale": match.scale, "equal": match.equal and dataset.target in slopes}
    return [
        own | {"name": value} | {field.name: slopes[value][field.name] for field in fields(Slope) if value in slopes}
        for value in dict.fromkeys([dataset.target, *slopes])
    ]


def chance_p(measured: float, random: Sequence[float] | pd.Series) -> float:
    """How often chance does as much, whatever its sign: the measured slope is one of those that it is compared with."""
    return float((1 + (np.abs(random) >= abs(measured)).sum()) / (1 + len(random)))


def comparable(random: pd.DataFrame) -> pd.DataFrame:
    """The random adapters that cost as much as what was measured."""
    slopes = random.reindex(columns=random.columns.union(["value", "t"], sort=False))  # if none left enough answers
    return slopes[slopes["equal"].astype(bool)].astype({"value": float, "t": float})


def null_check(measured: float, random: pd.DataFrame) -> NullCheck:
    """A measured slope among random ones, whatever their sign."""
    alike = comparable(random)
    if alike.empty:
        return NullCheck(0, len(random), median_t=math.nan, largest_slope=math.nan, share_below=math.nan, p=1.0)
    value = abs(measured)
    slopes = alike["value"].abs().to_numpy()
    return NullCheck(
        seeds=len(slopes),
        left_out=len(random) - len(slopes),
        median_t=float(np.median(alike["t"].abs())),
        largest_slope=float(slopes.max()),
        share_below=float((slopes < value).mean()),
        p=chance_p(value, slopes),
    )


def median_p(measured: Sequence[float], random: Sequence[pd.DataFrame]) -> float | None:
    """How often chance gives a median as large, where every seed has an adapter and random ones of its own.

    If steering did nothing that a random adapter does not, every seed's slope could as well be one of its random
    ones: the p of that randomisation, over all ways to take one slope per seed, the measured ones among them, or
    over many of these ways where they are too many.

    Args:
        measured: The adapter's slope, per seed.
        random: The random adapters' (`null_slopes`), per seed.

    Returns:
        None where some seed has no random adapter that could be brought to the adapter's cost.
    """
    pools = [np.append(comparable(table)["value"].to_numpy(), own) for own, table in zip(measured, random, strict=True)]
    if min(len(pool) for pool in pools) == 1:
        return None
    as_large = abs(np.median(measured))
    if math.prod(map(len, pools)) <= DRAWS:
        return float((np.abs(np.median(list(itertools.product(*pools)), axis=1)) >= as_large).mean())
    generator = np.random.default_rng(0)
    drawn = np.median([generator.choice(pool, DRAWS) for pool in pools], axis=0)
    return float((1 + (np.abs(drawn) >= as_large).sum()) / (1 + DRAWS))
