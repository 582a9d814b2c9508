"""Finished measurements on disk, one file each, so that an evaluation begun again goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from ipissa.errors import ConfigError
from ipissa.evaluate.compare import Degradation, Measured
from ipissa.evaluate.yardsticks import Yardsticks
from ipissa.files import write_text

SETTINGS = "settings.json"
PARTS = "parts"
APART = ("baselines", "null")  # settings that say which parts there are, and change none of them


class Parts:
    """The folder of an evaluation; one begun again may compare with more or fewer methods.

    Args:
        settings: What the measurements depend on.

    Raises:
        ConfigError: the folder holds an evaluation with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder / PARTS
        self._settings = folder / SETTINGS
        self._wanted = json.loads(json.dumps(dict(settings)))  # as JSON gives it back
        if self._settings.exists():
            found, wanted = json.loads(self._settings.read_text(encoding="utf-8")), self._wanted
            differing = {key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)}
            if differing - {*APART}:
                raise ConfigError(
                    f"{folder} holds an evaluation with another {', '.join(sorted(differing - {*APART}))}; choose "
                    "another --output, or delete the folder."
                )

    def load(self, name: str) -> Any:
        """A part, or None."""
        path = self._folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def save(self, name: str, value: Any) -> None:
        """Keep a part, whole or not at all; with the first one the folder is one of these settings."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._settings.exists():
            self.write_settings()
        try:
            written = json.dumps(value, allow_nan=False)
        except ValueError as error:
            raise ConfigError(
                f"{name}: a figure is no finite number, as the steered model overflows; use --dtype float32, or "
                "an adapter that moves it less."
            ) from error
        write_text(self._folder / f"{name}.json", written + "\n")

    def write_settings(self) -> None:
        """Say in the folder which settings it is of: with its report again, which may have had other methods before."""
        write_text(self._settings, json.dumps(self._wanted, indent=2, ensure_ascii=False) + "\n")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """A part from disk, or made and kept."""
        found = self.load(name)
        if found is None:
            found = make()
            self.save(name, found)
        return found


def measured_to_json(measured: Measured) -> dict[str, Any]:
    """Plain values; NaN, of answers that are none, as null."""
    return {
        "method": measured.method,
        "scale": measured.scale,
        "equal": measured.equal,
        "yardsticks": measured.yardsticks.to_dict(by_prompt=True),
        "degradation": [asdict(each) for each in measured.degradation],
        "rows": None if measured.rows is None else records(measured.rows),
    }


def measured_from_json(part: Mapping[str, Any]) -> Measured:
    """What `measured_to_json` wrote."""
    rows = part["rows"]
    return Measured(
        method=part["method"],
        scale=part["scale"],
        equal=part["equal"],
        yardsticks=Yardsticks.from_dict(part["yardsticks"]),
        degradation=[Degradation(**each) for each in part["degradation"]],
        rows=None if rows is None else pd.DataFrame(rows).astype({"log_odds": float, "alpha": float}),
    )


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON has them, NaN as null."""
    return table.astype(object).where(table.notna(), None).to_dict("records")
