"""Model names that are settings of the dials: `honest@0.75`, or `honest@0.7+kind@-0.2`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from ipissa.buckets import to_bucket
from ipissa.errors import AlphaError, ConfigError


@dataclass(frozen=True)
class SettingNames:
    """Reads and writes such names.

    Args:
        adapters: Names of the adapters there are.
        bucket: α is rounded to a multiple of this.
        limit: The largest |α|.
    """

    adapters: Collection[str]
    bucket: float
    limit: float

    def __post_init__(self) -> None:
        for adapter in self.adapters:
            if not set(adapter).isdisjoint("@+"):
                raise ConfigError(f"The adapter name {adapter!r} holds @ or +, which separate names; choose another.")

    def is_setting(self, name: str) -> bool:
        """Whether the name is about one of the adapters, well-formed or not."""
        return name.partition("@")[0] in self.adapters

    def read(self, name: str) -> dict[str, float]:
        """{adapter: α after bucketing} of a name, adapters at 0 included.

        Raises:
            AlphaError: an α is missing, not a finite number, out of range or given twice, or an adapter unknown.
        """
        steer: dict[str, float] = {}
        for part in name.split("+"):
            adapter, _, alpha = part.partition("@")
            if adapter not in self.adapters:
                known = ", ".join(self.adapters)
                raise AlphaError(f"The model {name!r} names the adapter {adapter!r}; there are {known}.")
            if adapter in steer:
                raise AlphaError(f"The model {name!r} names the adapter {adapter!r} twice; give it one α.")
            steer[adapter] = to_bucket(self._number(name, alpha), self.bucket, limit=self.limit)
        return steer

    def write(self, steer: dict[str, float]) -> str:
        """The one name of a setting, however it was spelt."""
        return "+".join(
            f"{adapter}@{str(alpha).removesuffix('.0')}" for adapter, alpha in sorted(steer.items()) if alpha
        )

    def _number(self, name: str, text: str) -> float:
        usage = f"write the adapter and a number from {-self.limit:g} to {self.limit:g}, as in honest@0.75"
        try:
            alpha = float(text)
        except ValueError:
            raise AlphaError(f"The model {name!r} has no α that is a number; {usage}.") from None
        if not math.isfinite(alpha) or abs(alpha) > self.limit:
            raise AlphaError(f"The model {name!r} has an α out of range; {usage}.")
        return alpha
