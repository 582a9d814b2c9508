"""What the plugin was asked to serve, read from the environment, as `vllm serve` has no options for plugins.

IPISSA_ADAPTERS       honest=/adapters/honest.safetensors,kind=/adapters/kind.safetensors
IPISSA_ALPHA_BUCKET   0.05    α is rounded to a multiple of this
IPISSA_MAX_ALPHA      10      the largest |α|
IPISSA_LORA_CAPACITY  64      settings kept in memory
IPISSA_LORA_DIR       where they are kept; /dev/shm unless set
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from ipissa.adapter import load_adapter
from ipissa.adapter.baking import Baker
from ipissa.adapter.lora_store import DEFAULT_CAPACITY, BakedLora, LoraStore, default_parent
from ipissa.adapter.named import named_adapters
from ipissa.errors import AlphaError, ConfigError
from ipissa.vllm.names import SettingNames

DEFAULT_BUCKET = 0.05
DEFAULT_MAX_ALPHA = 10.0


class Dials:
    """The adapters, and the LoRAs of their settings.

    Nothing is read before it is needed: every process of vLLM has its own `Dials`, and few of them bake.
    """

    def __init__(self, paths: Mapping[str, Path], *, bucket: float, limit: float, capacity: int) -> None:
        self._paths = dict(paths)
        self._capacity = capacity
        self.names = SettingNames(tuple(paths), bucket, limit)
        self.max_rank: int | None = None  # what the engine takes, once that is known

    @classmethod
    def from_environment(cls) -> Dials | None:
        """The dials that the environment names, or None without $IPISSA_ADAPTERS."""
        spelt = os.environ.get("IPISSA_ADAPTERS", "")
        paths = named_adapters([part.strip() for part in spelt.split(",") if part.strip()])
        if not paths:
            return None
        return cls(
            paths,
            bucket=_number("IPISSA_ALPHA_BUCKET", DEFAULT_BUCKET),
            limit=_number("IPISSA_MAX_ALPHA", DEFAULT_MAX_ALPHA),
            capacity=int(_number("IPISSA_LORA_CAPACITY", DEFAULT_CAPACITY)),
        )

    @cached_property
    def baker(self) -> Baker:
        """Bakes settings of these adapters; AdapterFileError if one cannot be read."""
        return Baker({name: load_adapter(path) for name, path in self._paths.items()})

    @cached_property
    def store(self) -> LoraStore:
        """Keeps what was baked."""
        return LoraStore(self.baker, capacity=self._capacity)

    def is_base(self, name: str) -> bool:
        """Whether a name sets every dial to 0, which is the base model."""
        try:
            return self.names.is_setting(name) and not any(self.names.read(name).values())
        except AlphaError:
            return False

    def resolve(self, name: str) -> tuple[str, BakedLora]:
        """The one name of a setting, and its LoRA, baked now if it is not there.

        Raises:
            AlphaError: the name is not a setting that can be served.
        """
        steer = self.names.read(name)
        turned = [adapter for adapter, alpha in steer.items() if alpha]
        if self.max_rank is not None and (rank := self.baker.rank(turned)) > self.max_rank:
            raise AlphaError(
                f"The model {name!r} is a LoRA of rank {rank}, and this server takes {self.max_rank}; "
                "turn fewer adapters at once, or start it with a larger --max-lora-rank."
            )
        return self.names.write(steer), self.store.get(steer)

    @contextmanager
    def baked_again(self, name: str) -> Iterator[Path]:
        """The LoRA of a name in a folder that is gone after the block."""
        parent = default_parent()
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".ipissa-lora-") as folder:
            self.baker.bake(self.names.read(name), Path(folder))
            yield Path(folder)


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{variable}={text} is not a number from 0 up; give one, such as {default:g}.")
    return value
