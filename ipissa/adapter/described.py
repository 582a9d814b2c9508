"""What every adapter file says, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Described:
    """Where an adapter belongs, what its poles mean, and how far it may be turned."""

    base_model: dict[str, Any]
    trait: dict[str, str]
    alpha_range: tuple[float, float] = (-1.0, 1.0)
    evaluation: dict[str, Any] = field(default_factory=dict)
    license: str = "apache-2.0"
    digest: str | None = None  # sha256 of the file, set when read or written

    @property
    def calibrated(self) -> bool:
        """Whether the file says from which text `alpha_range` was read."""
        return "calibration" in self.evaluation

    @property
    def name(self) -> str:
        """What to call the adapter when the user gives no name: the positive pole's words."""
        return self.trait["positive"].removeprefix("an ").removeprefix("a ")
