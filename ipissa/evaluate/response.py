"""The shape of a response to the dial: is it symmetric, does it rise all the way, and which answers flip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Symmetry:
    """How alike in size the two poles' changes are, and whether they have opposite signs.

    The published share alone calls a model that moves the same way at both poles symmetric.
    """

    share: float  # smaller over larger change, from 0 to 1; 0 where nothing moves
    opposite: bool


def symmetry(below: float, at_zero: float, above: float) -> Symmetry:
    """Of a mean score at α = -1, 0 and +1."""
    down, up = below - at_zero, above - at_zero
    larger = max(abs(down), abs(up))
    return Symmetry(share=min(abs(down), abs(up)) / larger if larger else 0.0, opposite=down * up < 0)


def monotonic_share(means: pd.DataFrame) -> float:
    """The share of values whose mean scores rise, or fall, all the way; `means` is (α, value), by rising α."""
    steps = np.diff(means.to_numpy(float), axis=0)
    return float(((steps > 0).all(0) | (steps < 0).all(0)).mean()) if means.shape[1] else 0.0


@dataclass(frozen=True)
class Flips:
    """Items whose answer changes between α = 0 and a pole, by whether the new answer shows the value."""

    towards: int
    away: int
    items: int


def flips(at_zero: pd.Series, at_pole: pd.Series) -> Flips:
    """Of scores l y of the same items; positive: the likelier answer shows the value."""
    towards = int(((at_zero <= 0) & (at_pole > 0)).sum())
    away = int(((at_zero > 0) & (at_pole <= 0)).sum())
    return Flips(towards, away, len(at_zero))
