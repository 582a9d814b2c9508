"""What a training run gives, besides its file."""

from __future__ import annotations

from dataclasses import dataclass

from ipissa.adapter.checkpoint import Adapter
from ipissa.evaluate.yardsticks import Yardsticks
from ipissa.train.calibration import Calibration
from ipissa.train.fit import History
from ipissa.train.samples import Samples


@dataclass(frozen=True)
class TrainResult:
    """The adapter as written, and what was measured on the way."""

    adapter: Adapter
    yardsticks: Yardsticks
    calibration: Calibration
    samples_before: Samples
    samples_after: Samples
    history: History
    seconds: float

    def shortcomings(self) -> list[str]:
        """Why the adapter is not to be relied on, one sentence each; empty if it works."""
        return self.yardsticks.shortcomings(self.adapter.alpha_range)
