"""The folder of one training run: its configuration, what it computed once, its checkpoints and its results.

    honest.run/
      config.yaml        the settings, and all it takes to train again
      state/             what was computed once: sampled texts, the objective's examples
      checkpoints/       written by the Trainer
      history.csv        figures per step          losses.png    the same, drawn
      layers.csv         what changed per layer    samples.md    texts before, midway and after

`state` and `checkpoints` are what a broken run resumes from; they go when the run is complete.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ipissa.errors import ConfigError
from ipissa.train.config import TrainConfig
from ipissa.train.fit import CHECKPOINTS

STATE = "state"


class RunFolder:
    """The run folder of an output file: `honest.safetensors` has `honest.run` beside it."""

    def __init__(self, path: Path, config: TrainConfig, shared: Path | None = None) -> None:
        self.path = path
        self.resumed = self.unfinished
        self._asked = digest(config.asked_of_the_base())
        self._shared = shared

    @classmethod
    def open(cls, output: Path, config: TrainConfig, *, resume: bool, shared: Path | None = None) -> RunFolder:
        """Create the folder, or enter the one of a broken run.

        Args:
            shared: A folder for what is computed once for all runs that ask the base model the same.

        Raises:
            ConfigError: a broken run is there and `resume` is off, or its settings or its files of prompts differ.
        """
        folder = cls(output.with_suffix(".run"), config, shared)
        settings = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        if folder.unfinished:
            if not resume:
                raise ConfigError(f"{folder.path} holds an unfinished run; go on with --resume, or remove the folder.")
            if (folder.path / "config.yaml").read_text(encoding="utf-8") != settings:
                raise ConfigError(
                    f"The settings differ from those in {folder.path / 'config.yaml'}, so that run cannot go on; "
                    "give the same ones, or remove the folder."
                )
        folder._check_texts()
        for needed in (folder.path / STATE, *([shared] if shared else [])):
            needed.mkdir(parents=True, exist_ok=True)
        write_whole(folder.path / "config.yaml", lambda path: path.write_text(settings, encoding="utf-8"))
        return folder

    @property
    def unfinished(self) -> bool:
        """Whether a run was begun here and not completed."""
        return (self.path / STATE).is_dir()

    def once(self, name: str, compute: Callable[[], Any], classes: Sequence[type] = ()) -> Any:
        """What `compute` finds of the base model, computed once: a resumed run, or one that shares it, reads it back.

        Args:
            name: Of the file, which also says by which settings and prompts it was computed.
            classes: The dataclasses in the result, the only ones that may be read back.
        """
        path = (self._shared or self.path / STATE) / f"{name}-{self._asked}.pt"
        if not path.exists():
            computed = compute()
            write_whole(path, lambda partial: torch.save(computed, partial))
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, weights_only=True)

    def _check_texts(self) -> None:
        """A run cannot go on with a model that learnt from other texts than those it would be given now."""
        kept = [path.stem for path in (self.path / STATE).glob("*.pt")]
        if any(not name.endswith(self._asked) for name in kept):
            raise ConfigError(
                f"The prompts have changed since the run in {self.path} began, so it cannot go on; put them back, or "
                "remove the folder."
            )

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A CSV file with one row per mapping and one column per name in any of them."""
        columns = list(dict.fromkeys(column for row in rows for column in row))

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)

        write_whole(self.path / name, write)

    def write_text(self, name: str, text: str) -> None:
        """A text file."""
        write_whole(self.path / name, lambda path: path.write_text(text, encoding="utf-8"))

    def complete(self) -> None:
        """Remove what only a broken run needs."""
        for name in (CHECKPOINTS, STATE):
            shutil.rmtree(self.path / name, ignore_errors=True)


def digest(settings: Mapping[str, Any]) -> str:
    """A short name that changes with any setting."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path` and move there, so that `path` is never half-written."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; make room or choose another --output.") from error
    finally:
        partial.unlink(missing_ok=True)
