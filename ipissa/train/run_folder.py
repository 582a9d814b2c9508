"""The folder of one training run: its configuration, what it computed once, its checkpoints and its results.

    honest.run/
      config.yaml        the settings, and all it takes to train again
      state/             what was computed once: sampled texts, teachers' targets
      checkpoints/       written by the Trainer
      history.csv        figures per step          losses.png    the same, drawn
      layers.csv         what changed per layer    samples.md    texts before, midway and after

`state` and `checkpoints` are what a broken run resumes from; they go when the run is complete.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ipissa.errors import ConfigError
from ipissa.files import write_table, write_text
from ipissa.train.answers import BaseAnswers, digest
from ipissa.train.config import TrainConfig, read_settings
from ipissa.train.fit import CHECKPOINTS, has_learnt
from ipissa.train.processes import count, of_the_first

logger = logging.getLogger(__name__)
STATE = "state"
ASKED = "asked"  # in the state: what was asked of which base model
PROCESSES = "processes"  # in the state: how many learn, each from rows of its own
CONFIG = "config.yaml"


class RunFolder:
    """The run folder of an output file: `honest.safetensors` has `honest.run` beside it.

    A broken run goes on with other settings of the learning alone (a lower rate, say): what the base model was asked is
    kept, and the learning begins anew. One that had learnt nothing yet gives way to a run that asks something else.

    Args:
        shared: A folder for what is computed once for all runs that ask the base model the same.

    Raises:
        ConfigError: a broken run is there and `resume` is off, or it asked the base model something else.
    """

    def __init__(self, output: Path, config: TrainConfig, *, resume: bool, shared: Path | None = None) -> None:
        self.path = output.with_suffix(".run")
        self._config = TrainConfig.from_dict(config.to_dict())  # as a file gives it back: 3 epochs are 3.0
        self._shared = shared
        self.resumed = self.unfinished
        self._learns_anew = self._asks_anew = False
        if self.unfinished:
            self._look_at_the_broken_run(resume)

    @property
    def unfinished(self) -> bool:
        """Whether a run was begun here and not completed."""
        return _is_unfinished(self.path)

    def begin(self, model: Any, tokenizer: Any) -> BaseAnswers:
        """Create what is missing of the folder, once the base model is there; where its answers are kept.

        Raises:
            ConfigError: a broken run was begun with other texts or weights.
        """
        answers = BaseAnswers(model, tokenizer, self._shared or self.path / STATE, self._config)
        began = f"{answers.asked}-{digest(self._config.contents())}"
        asked = self.path / STATE / ASKED
        if self.resumed and asked.read_text(encoding="utf-8") != began:
            raise ConfigError(
                f"The prompts, the suffixes or the base model have changed since the run in {self.path} began, or what "
                "it is computed in or on, so it cannot go on; put them back, or remove the folder."
            )
        # Only now, when the new settings are known to be of use, and all processes have looked at the broken run.
        of_the_first(partial(self._begin_in, asked, began))
        return answers

    def _begin_in(self, asked: Path, began: str) -> None:
        if self._asks_anew:
            shutil.rmtree(self.path / STATE)
        before = self._processes_before()
        others_learnt = self.resumed and before != count()
        if others_learnt:
            logger.warning("The broken run had %d processes and not %d: it learns anew.", before, count())
        if self._learns_anew or others_learnt:
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
        (self.path / STATE).mkdir(parents=True, exist_ok=True)
        self.write_text(CONFIG, yaml.safe_dump(self._config.to_dict(), sort_keys=False, allow_unicode=True))
        write_text(asked, began)
        write_text(asked.with_name(PROCESSES), str(count()))

    def _look_at_the_broken_run(self, resume: bool) -> None:
        if not (self.path / STATE / ASKED).exists():
            raise ConfigError(f"{self.path} holds a run of an earlier version, which cannot go on; remove the folder.")
        before, asked = self._before()
        asks_the_same = asked == self._config.asked_of_the_base()
        if not resume and not asks_the_same and not has_learnt(self.path):
            logger.warning("The broken run in %s had learnt nothing; its texts are dropped.", self.path)
            self._asks_anew, self.resumed = True, False
        elif not resume:
            raise ConfigError(f"{self.path} holds an unfinished run; go on with --resume, or remove the folder.")
        elif not asks_the_same:
            raise ConfigError(
                f"The settings differ from those in {self.path / CONFIG}, and with them what the base model was asked, "
                "so that run cannot go on; give the same ones, or remove the folder."
            )
        elif _learning(before) != _learning(self._config):
            logger.warning("The settings of the learning differ from those of the broken run, so it begins anew.")
            self._learns_anew = True

    def _processes_before(self) -> int:
        """How many processes the broken run had; those of an earlier version, which did not say, had mostly one."""
        path = self.path / STATE / PROCESSES
        return int(path.read_text(encoding="utf-8")) if path.exists() else 1

    def _before(self) -> tuple[TrainConfig, Mapping[str, Any]]:
        """The settings of the broken run, and what it asked of the base model."""
        try:
            before = TrainConfig.from_dict(read_settings(self.path / CONFIG))
            return before, before.asked_of_the_base()
        except ConfigError as error:
            raise ConfigError(
                f"{self.path} holds an unfinished run that cannot be read again: {error} Put that back, or remove the "
                "folder."
            ) from error

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


def check_unfinished(output: Path) -> None:
    """Refuse to go on with a run that is complete, as that would make its adapter anew.

    Raises:
        ConfigError: the adapter is there, and nothing that is left to do.
    """
    if output.exists() and not _is_unfinished(output.with_suffix(".run")):
        raise ConfigError(f"{output} is complete, so there is nothing to resume; leave out --resume to train anew.")


def _is_unfinished(folder: Path) -> bool:
    return any((folder / STATE).glob("*"))


def _learning(config: TrainConfig) -> str:
    """Of all that decides what is learnt; how a file is spelt, who is told of it and how often it is kept do not."""
    told = {"report_to": ""} | ({} if config.validation else {"checkpoint_every": 0, "patience": 0})
    return digest(config.to_dict() | config.contents() | told)
