"""Configuration of an InnerPiSSA adapter, in the form PEFT expects."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from peft import PeftConfig

from ipissa.errors import ConfigError
from ipissa.rotation import CLAMPS, ROTATIONS, check_angle
from ipissa.scaling import SCALE_MODES

PEFT_TYPE = "INNERPISSA"
DIRECTIONS = ("triples", "learnt")
MAX_ROTATION = 0.3


def one_of(value: str, table: Collection[str], *, name: str) -> None:
    """Raise `ConfigError` unless `value` is in `table`."""
    if value not in table:
        raise ConfigError(f"{name} {value!r} is unknown; use one of {', '.join(table)}.")


@dataclass
class InnerPissaConfig(PeftConfig):
    """An InnerPiSSA adapter: rotate and scale the top `r` singular triples of each target module.

    Args:
        r: Rank, the number of singular triples kept; at least 2, clipped to each module's own rank.
        target_modules: Module name suffixes (list) or a regular expression over full names (string).
        rotation: `cayley` or `matrix_exp`, the map from a skew matrix to a rotation.
        scale_mode: `add2`, `add_tanh`, `mult` or `none`, how singular values follow α.
        rotate_v: Train a rotation of the input singular vectors.
        rotate_u: Train a rotation of the output singular vectors.
        directions: `triples`, the r largest singular triples, or `learnt` (`ipissa.adapter.frame`): r directions of the
            input, an even number, mixed of all the layer's right singular vectors, which turn without scaling.
        clamp: `entries` (as published), `angles` (each plane's true angle) or `none`.
        max_rotation: Limit of the clamp, for entries or in radians.
        init_std: Standard deviation of the initial rotation parameters. At zero, +α and -α give the same output at
            first, and an objective that compares them has no gradient.
    """

    r: int = field(default=32, metadata={"help": "number of singular triples kept per module"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to leave alone"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "layer indices to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the layer list"})
    rotation: str = field(default="cayley", metadata={"help": "cayley | matrix_exp"})
    scale_mode: str = field(default="add2", metadata={"help": "add2 | add_tanh | mult | none"})
    rotate_v: bool = field(default=True, metadata={"help": "rotate input singular vectors"})
    rotate_u: bool = field(default=False, metadata={"help": "rotate output singular vectors"})
    directions: str = field(default="triples", metadata={"help": "triples | learnt"})
    clamp: str = field(default="entries", metadata={"help": "entries | angles | none"})
    max_rotation: float = field(default=MAX_ROTATION, metadata={"help": "limit of the clamp"})
    init_std: float = field(default=0.002, metadata={"help": "std of the initial rotation parameters"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(set(self.target_modules))
        one_of(self.rotation, ROTATIONS, name="rotation")
        one_of(self.scale_mode, SCALE_MODES, name="scale_mode")
        one_of(self.clamp, CLAMPS, name="clamp")
        one_of(self.directions, DIRECTIONS, name="directions")
        if self.r < 2:
            raise ConfigError(f"r {self.r} is too small: a rotation needs a plane, so use at least 2.")
        if not 0 < self.max_rotation < math.inf:
            raise ConfigError(f"max_rotation {self.max_rotation} is no limit; use clamp 'none' for none.")
        if self.clamp == "angles" and self.rotation == "cayley":
            check_angle(self.max_rotation)
        if self.init_std < 0:
            raise ConfigError(f"init_std {self.init_std} is negative.")
        if not (self.rotate_v or self.rotate_u) and self.scale_mode == "none":
            raise ConfigError("rotate_v, rotate_u and scale_mode are all off: nothing would be trained.")
        if self.directions == "learnt":
            self._check_learnt()

    def _check_learnt(self) -> None:
        if self.r % 2:
            raise ConfigError(f"r {self.r} is odd, and learnt directions turn in pairs; use an even rank.")
        wanted = {
            "rotate_v": True,
            "rotate_u": False,
            "scale_mode": "none",
            "clamp": "none",
            "max_rotation": MAX_ROTATION,  # the default, which is then of no account
        }
        for name, only in wanted.items():
            if getattr(self, name) != only:
                raise ConfigError(
                    f"{name} {getattr(self, name)!r} is for singular triples; learnt directions need {only!r}."
                )
