"""Activation vectors as adapters: α times a fixed direction is added to what some modules give.

    h(α) = h + α d        after a decoder block, or after a linear layer

In the file: `<module>.direction` (d,) per module, `kind` = `vector`. CAA, repeng and module PCA are such.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ipissa.adapter.described import Described


@dataclass(frozen=True)
class VectorConfig:
    """The modules whose outputs are added to."""

    modules: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class VectorAdapter(Described):
    """One direction per module, (d,) in float32 on the CPU, by full module name."""

    kind: ClassVar[str] = "vector"

    modules: dict[str, Tensor]

    @property
    def config(self) -> VectorConfig:
        """The `config` metadata."""
        return VectorConfig(tuple(self.modules))

    def tensors(self) -> dict[str, Tensor]:
        """By the names they have in the file."""
        return {f"{module}.direction": direction for module, direction in self.modules.items()}

    def flipped(self) -> VectorAdapter:
        """The adapter that does at α what this one does at -α."""
        return self.scaled(-1.0)

    def scaled(self, factor: float) -> VectorAdapter:
        """The adapter that does at α what this one does at `factor` times α."""
        modules = {module: factor * direction for module, direction in self.modules.items()}
        return replace(self, modules=modules, digest=None)
