"""Compare by turns: machines are noisy, so a figure is the median over rounds of a ratio within a round."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch

Timed = Callable[[], float]  # does the work, and returns its seconds


@dataclass(frozen=True)
class Ratio:
    """One row of a table: what was compared, what it should reach, and the ratio of every round."""

    name: str
    values: list[float]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def median(self) -> float:
        """The figure."""
        return statistics.median(self.values)

    def row(self) -> str:
        """As a row of a Markdown table."""
        goal, verdict = "", ""
        if self.at_least is not None:
            goal, verdict = f"at least {self.at_least:g}", "yes" if self.median >= self.at_least else "**no**"
        if self.at_most is not None:
            goal, verdict = f"at most {self.at_most:g}", "yes" if self.median <= self.at_most else "**no**"
        spread = f"{min(self.values):.3f} to {max(self.values):.3f}"
        return f"| {self.name} | {goal} | {self.median:.3f} | {spread} | {verdict} |"


HEADER = "| ratio | target | median | rounds | reached |\n|-|-|-|-|-|"


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def speed_ratios(ours: Timed, reference: Timed, rounds: int) -> list[float]:
    """How many times faster than the reference, once per round.

    The two take turns in alternating order, after a warm-up round that does not count.
    """
    found = []
    for i in range(rounds + 1):
        first, second = (ours, reference) if i % 2 else (reference, ours)
        a, b = first(), second()
        found.append(a / b if first is reference else b / a)
    return found[1:]


def machine(dtype: str) -> str:
    """What a table was measured on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{device}, {dtype}"
    )
