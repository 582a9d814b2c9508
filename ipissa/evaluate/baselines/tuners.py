"""LoRA and DoRA, trained as an adapter was: same texts, objective, modules, rank and steps, and the same dial.

The learning rate is their own: that of learnt directions is for steps of another size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import peft
import torch

from ipissa.adapter.checkpoint import Adapter
from ipissa.adapter.config import InnerPissaConfig
from ipissa.adapter.dial import add_dial
from ipissa.data.personas import Trait
from ipissa.data.prompts import load_prompts
from ipissa.errors import ConfigError
from ipissa.evaluate.dial import LayerDial
from ipissa.train.answers import BaseAnswers, training_targets, training_texts
from ipissa.train.config import TrainConfig
from ipissa.train.fit import fit
from ipissa.train.objectives.distill import KINDS, Distillation, Target

TUNERS = ("lora", "dora")
LEARNING_RATE = 3e-3  # theirs, as an adapter's is its own: docs/evaluation.md has how it was found
NAMES = "lora, dora and reft"  # all that learn as the adapter did


def training_config(adapter: Adapter) -> TrainConfig:
    """The settings an adapter was trained with, for one process (several had batches of their own) and no tracker.

    Raises:
        ConfigError: its file does not say, its objective is not a distillation, or its prompts are not here.
    """
    said = adapter.evaluation.get("training", {})
    known = {field.name for field in fields(TrainConfig)}
    if "positive" not in said:
        raise ConfigError(f"The file of {adapter.name!r} does not say how it was trained; leave out {NAMES}.")
    config = TrainConfig.from_dict({name: value for name, value in said.items() if name in known})
    if config.objective not in KINDS:
        raise ConfigError(
            f"{adapter.name!r} was trained with objective {config.objective!r}; {NAMES} need one of {KINDS}."
        )
    try:
        load_prompts(config.prompts)
    except ConfigError as error:
        raise ConfigError(f"{adapter.name!r} cannot be learnt from anew: {error} Or leave out {NAMES}.") from error
    return replace(config, accumulation=config.accumulation * said.get("processes", 1), report_to="none")


def distillation_targets(
    model: Any, tokenizer: Any, trait: Trait, config: TrainConfig, prompts: Sequence[str], answers: BaseAnswers
) -> list[Target]:
    """What the adapter learnt from: the same texts from the same seed, and their teachers."""
    texts = training_texts(model, tokenizer, trait, config, prompts[: config.max_prompts], answers)
    return training_targets(model, tokenizer, trait, config, texts, config.objective, answers)


def lora_like(config: InnerPissaConfig, *, dora: bool = False) -> peft.LoraConfig:
    """A LoRA or DoRA of the rank and modules of an InnerPiSSA adapter."""
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.r,
        target_modules=config.target_modules,
        layers_to_transform=config.layers_to_transform,
        use_dora=dora,
        task_type="CAUSAL_LM",
    )


@contextmanager
def trained_tuner(
    kind: str, model: Any, tokenizer: Any, config: TrainConfig, targets: Sequence[Target], state: Path
) -> Iterator[LayerDial]:
    """`model` with a LoRA or DoRA fitted to `targets`; the model is itself again afterwards.

    Args:
        state: Folder of the checkpoints, one per kind, from which training that was broken off goes on.
    """
    model.requires_grad_(False)
    same = config.adapter_config(model.config.get_text_config().num_hidden_layers)
    torch.manual_seed(config.seed)
    peft_model = peft.get_peft_model(model, lora_like(same, dora=kind == "dora"))
    handles = add_dial(peft_model)
    try:
        settings = replace(config, lr=LEARNING_RATE)
        fit(peft_model, Distillation(targets, pad_id=tokenizer.pad_token_id), settings, state / kind, resume=True)
        yield LayerDial(peft_model)
    finally:
        for handle in handles:
            handle.remove()
        peft_model.unload()
