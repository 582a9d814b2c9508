"""How the commands end: an error is one sentence on standard error, never a traceback."""

from __future__ import annotations

import sys

import typer

from ipissa.errors import IpissaError


def run_cli(command: typer.Typer, args: list[str] | None = None) -> None:
    """Run a Typer command; exit 1 with one sentence on an error that is the user's to mend."""
    try:
        command(args)
    except (IpissaError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
