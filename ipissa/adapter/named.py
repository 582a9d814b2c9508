"""Adapters by name, as commands and environment variables spell them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ipissa.errors import ConfigError


def named_adapters(values: Sequence[str]) -> dict[str, Path]:
    """Adapter files by name, from PATH (named after the file) or NAME=PATH."""
    adapters: dict[str, Path] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or Path(value).is_file():  # a path may have a = of its own
            name, path = Path(value).stem, value
        if not name:
            raise ConfigError(f"--adapter {value!r} has an empty name; write NAME=PATH.")
        if name in adapters:
            raise ConfigError(f"--adapter names {name!r} twice; write NAME=PATH with different names.")
        adapters[name] = Path(path)
    return adapters
