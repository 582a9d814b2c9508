"""What chance alone does: random adapters that cost as much as the one that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ipissa.data.items import Dataset
from ipissa.evaluate.analysis import item_labels
from ipissa.evaluate.baselines.random import random_like
from ipissa.evaluate.choices import complete, measure_choices
from ipissa.evaluate.compare import scale_to
from ipissa.evaluate.dial import ScaledDial
from ipissa.evaluate.methods import Materials, attached
from ipissa.evaluate.slopes import balanced_slope, with_labels
from ipissa.evaluate.steerer import Steerer

ALPHAS = (-1.0, 0.0, 1.0)


@dataclass(frozen=True)
class NullCheck:
    """Where a slope falls among those of random adapters."""

    seeds: int
    median_t: float  # of |t|
    largest_slope: float  # of |slope|
    share_below: float  # of random |slopes| below the measured one
    p: float  # (1 + random ones at least as large) / (1 + seeds)

    def sentence(self) -> str:
        """For the report."""
        return (
            f"Of {self.seeds} random adapters that cost text as much, {self.share_below:.0%} move the balanced score "
            f"less (permutation p = {self.p:.3f}); their |t| has a median of {self.median_t:.2f}, and the largest "
            f"slope is {self.largest_slope:.3f} nats."
        )


def null_slopes(m: Materials, dataset: Dataset, *, degradation: float, seeds: Sequence[int]) -> pd.DataFrame:
    """The balanced slope of a random adapter per seed, each brought to `degradation`, over α in -1, 0 and 1."""
    own = [item for item in dataset.items if dataset.target in item.labels]
    some = Dataset(dataset.name, own, dataset.target)
    labels = item_labels(some)[dataset.target]
    found: list[dict[str, Any]] = []
    scale = 1.0
    for seed in tqdm(seeds, desc="random adapters"):
        with attached(m.model, random_like(m.innerpissa(), m.model, seed=seed)) as steerer:
            scale = scale_to(degradation, steerer, m, start=scale).scale  # that of the one before is nearly it
            rows = measure_choices(Steerer(ScaledDial(steerer.dial, scale)), m.tokenizer, some, ALPHAS)
        found.append({"seed": seed, **asdict(balanced_slope(with_labels(complete(rows), labels)).trait)})
    return pd.DataFrame(found)


def null_check(measured: float, random: pd.DataFrame) -> NullCheck:
    """A measured slope among random ones, whatever their sign."""
    value = abs(measured)
    slopes = random["value"].abs().to_numpy()
    return NullCheck(
        seeds=len(slopes),
        median_t=float(np.median(random["t"].abs())),
        largest_slope=float(slopes.max()),
        share_below=float((slopes < value).mean()),
        p=float((1 + (slopes >= value).sum()) / (1 + len(slopes))),
    )
