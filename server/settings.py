"""What `ipissa-serve` was asked to do, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipissa.buckets import MAX_ALPHA
from ipissa.errors import ConfigError
from ipissa.models import DEMO_MODEL

DEFAULT_MAX_ALPHA = 10.0
ALPHA_BUCKETS = {"torch": 0.001, "vllm": 0.05}  # by engine: vLLM holds a LoRA per bucket, and the page still glides


@dataclass(frozen=True)
class Settings:
    """Settings of one server.

    Args:
        model: Base model, as `ipissa.load_model` takes it.
        adapters: Adapter files by the names that requests use.
        engine: `torch` or `vllm`.
        alpha_bucket: α is rounded to a multiple of this; 0 keeps it exact; None for the engine's own.
        max_alpha: Requests beyond this |α| are refused.
        default_alpha: α of requests that give none and whose adapter is clear.
        api_key: Bearer token that requests must carry, or None for an open server.
        adapter_dir: Folder that adapters may be loaded from while the server runs.
        ui: Whether `/` is the page.
        max_batch: Most sequences in one request, and most decoding at a time.
        max_queue: Most requests waiting or running; more are answered 429.
        max_model_len: Most tokens of prompt and answer together; None for the model's own limit.
        max_cache_tokens: Most tokens kept in memory, sequences x longest sequence; None for the engine's own.
        vllm: Engine arguments of vLLM's by name.
    """

    model: str = DEMO_MODEL
    adapters: dict[str, Path] = field(default_factory=dict)
    engine: str = "torch"
    device: str = "auto"
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    adapter_dir: Path | None = None
    ui: bool = True
    alpha_bucket: float | None = None
    max_alpha: float = DEFAULT_MAX_ALPHA
    default_alpha: float = 0.0
    max_batch: int = 64
    max_queue: int = 128
    max_model_len: int | None = None
    max_cache_tokens: int | None = None
    vllm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine not in ALPHA_BUCKETS:
            raise ConfigError(f"engine {self.engine!r} is unknown; use {' or '.join(ALPHA_BUCKETS)}.")
        if self.vllm and self.engine != "vllm":
            raise ConfigError(f"{', '.join(self.vllm)} is for vLLM; add --engine vllm, or leave it out.")
        for name in ("bucket", "max_alpha", "default_alpha"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} {getattr(self, name)} is not a finite number.")
        if not 0 <= self.bucket <= 1:
            raise ConfigError(f"alpha_bucket {self.alpha_bucket} is not between 0 (exact) and 1.")
        if self.max_alpha <= 0:
            raise ConfigError(f"max_alpha {self.max_alpha} is not positive.")
        if self.max_alpha >= MAX_ALPHA:
            raise ConfigError(f"max_alpha {self.max_alpha:g} is not below {MAX_ALPHA:g}, the most a model can be at.")
        if self.bucket > self.max_alpha:
            raise ConfigError(
                f"alpha_bucket {self.bucket:g} is more than max_alpha {self.max_alpha:g}, so that every α would be 0; "
                "lower it, or raise max_alpha."
            )
        if abs(self.default_alpha) > self.max_alpha:
            raise ConfigError(f"default_alpha {self.default_alpha} is beyond max_alpha {self.max_alpha}.")
        for name in ("max_batch", "max_queue"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} is not at least 1.")
        if self.max_cache_tokens is not None and self.max_cache_tokens < 2:
            raise ConfigError(f"max_cache_tokens {self.max_cache_tokens} is not at least 2.")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"max_model_len {self.max_model_len} is not at least 2.")
        self._check_key()
        if self.adapter_dir is not None and not self.adapter_dir.is_dir():
            raise ConfigError(f"adapter_dir {str(self.adapter_dir)!r} is not a folder.")
        if self.model in self.adapters:
            raise ConfigError(f"An adapter cannot have the base model's name {self.model!r}; choose another name.")

    def _check_key(self) -> None:
        """Drop blanks around the key, which a header cannot carry, and refuse a key that no header carries."""
        if self.api_key is None:
            return
        key = self.api_key.strip()
        if not key:
            raise ConfigError("api_key is empty, which would let everybody in; give a key or leave the option out.")
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("api_key holds characters that no header can carry; use ASCII letters, digits and signs.")
        object.__setattr__(self, "api_key", key)

    @property
    def bucket(self) -> float:
        """α is rounded to a multiple of this; 0 keeps it exact."""
        return ALPHA_BUCKETS[self.engine] if self.alpha_bucket is None else self.alpha_bucket
