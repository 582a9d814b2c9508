"""The training run of a served adapter: `honest.safetensors` has `honest.run` beside it."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import yaml

from ipissa.errors import AdapterFileError


def run_folder(adapter: Path | None) -> Path | None:
    """The run folder of an adapter's file, if there is one."""
    folder = adapter.with_suffix(".run") if adapter else None
    return folder if folder and folder.is_dir() else None


def read_run(folder: Path) -> dict[str, Any]:
    """Settings, figures per step and per layer, and sampled texts; a part that was not recorded is empty.

    Raises:
        AdapterFileError: a part is there and cannot be read.
    """
    try:
        return {
            "config": yaml.safe_load(_text(folder / "config.yaml")) or {},
            "history": _table(folder / "history.csv"),
            "layers": _table(folder / "layers.csv"),
            "samples": _text(folder / "samples.md"),
        }
    except (OSError, ValueError, RecursionError, csv.Error, yaml.YAMLError) as error:
        raise AdapterFileError(f"The training run in {folder.name} cannot be read: {error}.") from error


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _table(path: Path) -> list[dict[str, float | str | None]]:
    # A line may be cut short: training writes the file while it is read.
    rows = list(csv.DictReader(_text(path).splitlines(), restkey="", restval=""))
    if any("" in row for row in rows):
        raise ValueError(f"{path.name} has a line with more cells than it has columns")
    return [{name: _cell(text) for name, text in row.items()} for row in rows]


def _cell(text: str) -> float | str | None:
    try:
        number = float(text)
    except ValueError:
        return text or None
    return number if math.isfinite(number) else None  # JSON has no NaN
