"""What an evaluation measures, and on what."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ipissa
from ipissa.adapter.config import one_of
from ipissa.data.datasets import BUNDLED, BUNDLED_ITEMS
from ipissa.data.prompts import digest_of, load_evaluation_prompts
from ipissa.errors import ConfigError
from ipissa.evaluate.methods import METHODS, QUICK_METHODS
from ipissa.models import dtype_name, resolve_device

ALPHAS = (-1.0, -0.5, 0.0, 0.5, 1.0)
MIN_NULL, MAX_NULL = 5, 1000
MAX_SEED = 4_000_000  # times MAX_NULL, one for every random adapter, within the 32 bits that a seed has
DIGEST = " (sha256 "  # between a file's name and what says that its content is the same


@dataclass(frozen=True)
class EvalSettings:
    """Settings of `ipissa eval`.

    Args:
        baselines: Other ways to steer, by name.
        model: Base model; None for the one the adapter names.
        prompts: Text file for the yardsticks; None for the bundled ones.
        held_out: Held-out prompts, at most.
        dataset: `bundled`, a JSONL or CSV file, or a hub id; None to leave dilemmas out.
        target: The value to measure in dilemmas; None for the data set's own.
        topic: Only dilemmas of this topic.
        max_items: Items, at most.
        alphas: At which dilemmas are asked; 0 and the poles are always among them.
        null: Random adapters to compare with; 0 for none.
        seed: Of sampling, of the random adapter and of methods that are trained.
    """

    baselines: tuple[str, ...] = QUICK_METHODS
    model: str | None = None
    prompts: str | None = None
    held_out: int = 100
    dataset: str | None = "bundled"
    target: str | None = None
    topic: str | None = None
    max_items: int | None = None
    alphas: tuple[float, ...] = ALPHAS
    null: int = 0
    seed: int = 0
    device: str = "auto"
    dtype: str = "fast"

    def __post_init__(self) -> None:
        for name in self.baselines:
            one_of(name, METHODS, name="baseline")
            if self.baselines.count(name) > 1:
                raise ConfigError(f"baseline {name!r} is named {self.baselines.count(name)} times; name it once.")
        if not all(-1e3 < alpha < 1e3 for alpha in self.alphas):
            raise ConfigError(f"alphas {list(self.alphas)} hold a number that is no α; use some such as -1, 0.5, 1.")
        if self.null and self.null < MIN_NULL:
            raise ConfigError(f"null {self.null} random adapters say nothing; use at least {MIN_NULL}, or 0 for none.")
        if self.null > MAX_NULL:
            raise ConfigError(
                f"null {self.null} random adapters are more than there are seeds; use at most {MAX_NULL}."
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed {self.seed} is not between 0 and {MAX_SEED}.")
        if self.dataset is None:
            for name in ("null", "target", "topic", "max_items"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name} is of dilemmas, and there is no data set; give --dataset, or leave it out."
                    )

    def described(self) -> dict[str, Any]:
        """What figures depend on: files by content rather than by where they lie, and what is chosen by the machine."""
        device = resolve_device(self.device)
        return asdict(self) | {
            "model": Path(self.model).name if self.model and Path(self.model).exists() else self.model,
            "dataset": _named(BUNDLED_ITEMS if self.dataset == BUNDLED else self.dataset),
            "prompts": f"{Path(self.prompts).name if self.prompts else 'bundled'} ({self._prompts_digest()})",
            "device": device.type,
            "dtype": dtype_name(self.dtype, device),
            "ipissa": ipissa.__version__,
        }

    def _prompts_digest(self) -> str:
        return digest_of([prompt for side in load_evaluation_prompts(self.prompts) for prompt in side])

    def grid(self) -> list[float]:
        """The α of dilemmas, 0 and the poles among them, rising."""
        return sorted({-1.0, 0.0, 1.0, *(float(alpha) for alpha in self.alphas)})


def _named(source: str | None) -> str | None:
    if source is None or not Path(source).is_file():
        return source
    with Path(source).open("rb") as file:
        return f"{Path(source).name}{DIGEST}{hashlib.file_digest(file, 'sha256').hexdigest()[:12]})"


def dataset_name(described: str) -> str:
    """The name alone of a data set in `EvalSettings.described`."""
    return described.split(DIGEST)[0]
