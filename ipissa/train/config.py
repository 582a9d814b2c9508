"""Everything that decides a training run, serialisable and with working defaults."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ipissa.adapter.config import InnerPissaConfig
from ipissa.adapter.model import RESIDUAL_WRITERS
from ipissa.errors import ConfigError
from ipissa.models import DEMO_MODEL


@dataclass(frozen=True)
class TrainConfig:
    """One training run: the trait, the model, the adapter, the data and the optimiser.

    Args:
        positive: Word or phrase for α = +1.
        negative: Word or phrase for α = -1.
        model: Base model: demo model name, hub id, folder or GGUF file.
        prompts: Text file with one prompt per line, or None for the bundled list.
        rank: Singular triples per module.
        depth_start, depth_end: Adapted blocks as fractions of the depth, [start, end).
        continuations: Sampled continuations per prompt and pole.
        max_new_tokens: Length of a continuation in tokens.
        teacher_top_k: Teacher probabilities kept per token; the rest is one tail class.
        epochs: Passes over the continuations; every row is one (prompt, pole, context).
        batch_size: Rows per step, even: both poles of a prompt share a batch.
        lr: Peak learning rate of AdamW under a one-cycle schedule.
        held_out: Cap on the held-out prompts used for the yardsticks.
        held_out_continuations: Sampled answers per held-out prompt and pole.
    """

    positive: str
    negative: str
    model: str = DEMO_MODEL
    prompts: str | None = None
    rank: int = 32
    rotation: str = "cayley"
    scale_mode: str = "add2"
    rotate_v: bool = True
    rotate_u: bool = False
    clamp: str = "entries"
    max_rotation: float = 0.3
    target_modules: tuple[str, ...] = tuple(RESIDUAL_WRITERS)
    depth_start: float = 0.2
    depth_end: float = 0.9
    continuations: int = 1
    max_new_tokens: int = 32
    temperature: float = 0.8
    top_p: float = 0.95
    teacher_top_k: int = 512
    epochs: float = 1.5
    batch_size: int = 12
    lr: float = 1e-3
    weight_decay: float = 1e-5
    max_grad_norm: float = 1.0
    held_out: int = 100
    held_out_continuations: int = 1
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in (
            "continuations",
            "max_new_tokens",
            "teacher_top_k",
            "epochs",
            "batch_size",
            "lr",
            "held_out",
            "held_out_continuations",
            "temperature",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} {getattr(self, name)} is not positive.")
        if not math.isfinite(self.epochs) or not math.isfinite(self.lr):
            raise ConfigError(f"epochs {self.epochs} and lr {self.lr} must be finite numbers.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} is not between 0 and 2**63 - 1.")
        if self.batch_size % 2:
            raise ConfigError(f"batch_size {self.batch_size} is odd; both poles share a batch, so use an even number.")
        if not 0 <= self.depth_start < self.depth_end <= 1:
            raise ConfigError(f"depth_start {self.depth_start} and depth_end {self.depth_end} are not 0 <= a < b <= 1.")

    def adapter_config(self, num_layers: int) -> InnerPissaConfig:
        """The PEFT configuration for a model of `num_layers` blocks."""
        first, last = int(self.depth_start * num_layers), int(self.depth_end * num_layers)
        return InnerPissaConfig(
            r=self.rank,
            target_modules=list(self.target_modules),
            layers_to_transform=list(range(first, max(last, first + 1))),
            rotation=self.rotation,
            scale_mode=self.scale_mode,
            rotate_v=self.rotate_v,
            rotate_u=self.rotate_u,
            clamp=self.clamp,
            max_rotation=self.max_rotation,
            task_type="CAUSAL_LM",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
