"""What a method reaches at the scale that suits it best, whatever it costs.

Equal degradation compares on the adapter's terms. Here a method may choose: of some scales around that one, or around
the one that it was trained at, the one with the largest trait gain at its worse pole, found on prompts for tuning and
measured on held-out ones. The adapter may not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ipissa.evaluate.compare import over_poles
from ipissa.evaluate.dial import ScaledDial
from ipissa.evaluate.methods import TRAINED, VECTORS, Materials, made
from ipissa.evaluate.steerer import Steerer
from ipissa.evaluate.yardsticks import Yardsticks, measure_yardsticks, worse_trait_gains

# Towards 0 every gain ends at 0, so what has none at the least has none.
STEPS = tuple(2.0**k for k in range(-6, 3))
SCALABLE = (*VECTORS, "sspace", "random", *TRAINED)


@dataclass(frozen=True)
class Best:
    """A method at its best scale."""

    method: str
    scale: float
    degradation: float  # of text, over both poles, on held-out prompts
    yardsticks: Yardsticks

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Best:
        """What `to_dict` gave."""
        return cls(**{**values, "yardsticks": Yardsticks.from_dict(values["yardsticks"])})


def measure_at_best(method: str, m: Materials, *, equal: float | None) -> Best:
    """Choose among `STEPS` times the scale of equal degradation, or of its training, and measure there.

    Args:
        equal: That scale; None where there is none, and steps are around the method's own scale, 1.
    """
    around = 1.0 if equal is None or method in TRAINED else equal
    with made(method, m) as steerer:
        gains = worse_trait_gains(steerer.dial, m.tuning_told, [around * step for step in STEPS])
        scale = max((scale for scale, gain in gains.items() if math.isfinite(gain)), key=gains.__getitem__)
        dial = ScaledDial(steerer.dial, scale)
        return Best(method, scale, over_poles(Steerer(dial), m, m.plain), measure_yardsticks(dial, m.held_out))
