"""What a base model is asked before anything learns from it: its texts, and its predictions of them, asked once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ipissa.adapter.base_model import weights_digest
from ipissa.data.continuations import Continuation, sample_continuations
from ipissa.data.personas import Trait
from ipissa.errors import TrainingError
from ipissa.files import READ_ERRORS, write_whole
from ipissa.models import dtype_name, resolve_device
from ipissa.train.config import TrainConfig
from ipissa.train.objectives.distill import Target, build_targets
from ipissa.train.processes import of_the_first


class BaseAnswers:
    """The answers in a folder, for whoever asks the same base model the same.

    Args:
        model: The base model, with nothing attached to it.
        folder: May hold the answers to other questions too; made when the first is kept.
        config: Decides what is asked; settings of the learning do not.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path, config: TrainConfig) -> None:
        self._folder = folder
        self.asked = digest(config.asked_of_the_base() | _computed_by(model, tokenizer, config))

    def once(self, name: str, compute: Callable[[], Any], classes: Sequence[type] = ()) -> Any:
        """What `compute` finds of the base model, computed once and read back from then on.

        Args:
            name: Of the file, which also says by which settings, prompts and weights it was computed.
            classes: The dataclasses in the result, the only ones that may be read back.
        """
        path = self._folder / f"{name}-{self.asked}.pt"

        def keep() -> None:
            if not path.exists():
                self._folder.mkdir(parents=True, exist_ok=True)  # refused before the hours that computing takes
                computed = compute()
                write_whole(path, lambda partial: torch.save(computed, partial))

        of_the_first(keep)
        try:
            with torch.serialization.safe_globals(list(classes)):
                return torch.load(path, weights_only=True)
        except READ_ERRORS as error:
            raise TrainingError(f"{path} cannot be read: {error}; remove it, and it is computed again.") from error


def _computed_by(model: Any, tokenizer: Any, config: TrainConfig) -> dict[str, Any]:
    """Which weights, and what else the answers change with: settings such as `auto` mean another thing elsewhere."""
    device = resolve_device(config.device)
    return {
        "weights": weights_digest(model),
        "computed_in": dtype_name(config.dtype, device),
        "computed_on": device.type,
        "chat_template": tokenizer.chat_template,
    }


def training_texts(
    model: Any, tokenizer: Any, trait: Trait, config: TrainConfig, prompts: Sequence[str], answers: BaseAnswers
) -> list[Continuation]:
    """What the base model says to the training prompts under both personas."""

    def sample() -> list[Continuation]:
        return sample_continuations(
            model,
            tokenizer,
            trait,
            prompts,
            per_prompt=config.continuations,
            sampling=config.sampling(),
            seed=config.seed,
        )

    return answers.once("continuations", sample, [Continuation])


def training_targets(
    model: Any,
    tokenizer: Any,
    trait: Trait,
    config: TrainConfig,
    texts: Sequence[Continuation],
    kind: str,
    answers: BaseAnswers,
) -> list[Target]:
    """What a distillation of one of `KINDS` teaches on these texts."""

    def teach() -> list[Target]:
        return build_targets(model, tokenizer, trait, texts, kind=kind, **config.target_settings())

    return answers.once(f"targets-{kind}", teach, [Target])


def digest(settings: Mapping[str, Any]) -> str:
    """A short name that changes with any setting."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
