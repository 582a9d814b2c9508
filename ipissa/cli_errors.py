"""What the commands share: NAME=VALUE options, and errors that are one sentence, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import typer
import yaml

from ipissa.errors import ConfigError, IpissaError

LESS_MEMORY = (
    "Use a smaller model or --dtype bfloat16; training takes less with a smaller --batch-size, and goes on with "
    "--resume."
)


def run_cli(command: typer.Typer, args: list[str] | None = None) -> None:
    """Run a Typer command; exit 1 with one sentence on an error that is the user's to mend."""
    try:
        command(args)
    except (IpissaError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not _is_of_memory(error):
            raise
        print(f"Error: Memory is full: {_first_line(error)} {LESS_MEMORY}", file=sys.stderr)
        sys.exit(1)


def _is_of_memory(error: RuntimeError) -> bool:
    """torch's own error of a device, or that of its allocator on the CPU, which has no type."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _first_line(error: RuntimeError) -> str:
    line = str(error).strip().splitlines()[0]
    return line if line.endswith(".") else f"{line}."


def assignments(option: str, pairs: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE texts of an option as settings; values are read as YAML."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{option} {pair!r} has no '='; write {option} NAME=VALUE.")
        try:
            settings[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(
                f"{option} {pair!r} has a value that is no YAML; quote it, or close its brackets."
            ) from None
    return settings
