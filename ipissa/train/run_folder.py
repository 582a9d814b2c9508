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

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ipissa.errors import ConfigError
from ipissa.files import write_table, write_text, write_whole
from ipissa.train.config import TrainConfig, read_settings
from ipissa.train.fit import CHECKPOINTS

logger = logging.getLogger(__name__)
STATE = "state"
ASKED = "asked"  # in the state: what was asked of which base model
CONFIG = "config.yaml"


class RunFolder:
    """The run folder of an output file: `honest.safetensors` has `honest.run` beside it."""

    def __init__(self, path: Path, asked: str, shared: Path | None = None) -> None:
        self.path = path
        self.resumed = self.unfinished
        self._asked = asked
        self._shared = shared

    @classmethod
    def open(
        cls, output: Path, config: TrainConfig, *, weights: str = "", resume: bool, shared: Path | None = None
    ) -> RunFolder:
        """Create the folder, or enter the one of a broken run.

        A broken run goes on with other settings of the learning alone (a lower rate, say): what the base model was
        asked is kept, and the learning begins anew.

        Args:
            weights: A digest of the base model's weights.
            shared: A folder for what is computed once for all runs that ask the base model the same.

        Raises:
            ConfigError: a broken run is there and `resume` is off, or it asked the base model something else.
        """
        folder = cls(output.with_suffix(".run"), digest(config.asked_of_the_base() | {"weights": weights}), shared)
        if folder.unfinished:
            if not resume:
                raise ConfigError(f"{folder.path} holds an unfinished run; go on with --resume, or remove the folder.")
            folder._check(config)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_text(CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
        for needed in (folder.path / STATE, *([shared] if shared else [])):
            needed.mkdir(parents=True, exist_ok=True)
        folder.write_text(f"{STATE}/{ASKED}", folder._began(config))
        return folder

    @property
    def unfinished(self) -> bool:
        """Whether a run was begun here and not completed."""
        return (self.path / STATE).is_dir()

    def once(self, name: str, compute: Callable[[], Any], classes: Sequence[type] = ()) -> Any:
        """What `compute` finds of the base model, computed once: a resumed run, or one that shares it, reads it back.

        Args:
            name: Of the file, which also says by which settings, prompts and weights it was computed.
            classes: The dataclasses in the result, the only ones that may be read back.
        """
        path = (self._shared or self.path / STATE) / f"{name}-{self._asked}.pt"
        if not path.exists():
            computed = compute()
            write_whole(path, lambda partial: torch.save(computed, partial))
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, weights_only=True)

    def _began(self, config: TrainConfig) -> str:
        """What a run that goes on must have in common with the one that was broken off."""
        return f"{self._asked}-{digest(config.contents())}"

    def _check(self, config: TrainConfig) -> None:
        before = TrainConfig.from_dict(read_settings(self.path / CONFIG))
        if before.asked_of_the_base() != config.asked_of_the_base():
            raise ConfigError(
                f"The settings differ from those in {self.path / CONFIG}, and with them what the base model was asked, "
                "so that run cannot go on; give the same ones, or remove the folder."
            )
        asked = self.path / STATE / ASKED
        if not asked.exists() or asked.read_text(encoding="utf-8") != self._began(config):
            raise ConfigError(
                f"The prompts, the suffixes or the base model have changed since the run in {self.path} began, "
                "so it cannot go on; put them back, or remove the folder."
            )
        if before != config:
            logger.warning("The settings of the learning differ from those of the broken run, so it begins anew.")
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A CSV file with one row per mapping and one column per name in any of them."""
        columns = list(dict.fromkeys(column for row in rows for column in row))

        write_table(self.path / name, columns, rows)

    def write_text(self, name: str, text: str) -> None:
        """A text file."""
        write_text(self.path / name, text)

    def complete(self) -> None:
        """Remove what only a broken run needs."""
        for name in (CHECKPOINTS, STATE):
            shutil.rmtree(self.path / name, ignore_errors=True)


def digest(settings: Mapping[str, Any]) -> str:
    """A short name that changes with any setting."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
