"""What the commands share: NAME=VALUE options, and errors that are one sentence, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import typer
import yaml

from ipissa.errors import ConfigError, IpissaError


def run_cli(command: typer.Typer, args: list[str] | None = None) -> None:
    """Run a Typer command; exit 1 with one sentence on an error that is the user's to mend."""
    try:
        command(args)
    except (IpissaError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


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
