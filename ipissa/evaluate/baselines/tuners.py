"""LoRA and DoRA, trained as an adapter was: same texts, objective, modules, rank and steps, and the same dial.

The learning rate is their own: that of learnt directions is for steps of another size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from ipissa.train.answers import BaseAnswers, training_texts
from ipissa.train.config import TrainConfig
from ipissa.train.fit import fit, is_fitted, load_fitted
from ipissa.train.objectives.base import Objective
from ipissa.train.objectives.build import compares_states, objective_weights, says_which_pole
from ipissa.train.teaching import objective_to_learn, pairs_to_learn

TUNERS = ("lora", "dora")
LEARNING_RATE = 3e-3  # theirs, as an adapter's is its own: docs/evaluation.md has how it was found
ON_STATES = 0.1  # of it, for losses on hidden states alone, as docs/training.md says of adapters
NAMES = "lora, dora and reft"  # all that learn as the adapter did


def training_config(adapter: Adapter) -> TrainConfig:
    """The settings an adapter was trained with, for one process (several had batches of their own) and no tracker.

    Raises:
        ConfigError: its file does not say, or its prompts or suffixes are not here.
    """
    said = adapter.evaluation.get("training", {})
    known = {field.name for field in fields(TrainConfig)}
    if "positive" not in said:
        raise ConfigError(f"The file of {adapter.name!r} does not say how it was trained; leave out {NAMES}.")
    config = TrainConfig.from_dict({name: value for name, value in said.items() if name in known})
    if not compares_states(objective_weights(config.objective)):
        config = replace(config, suffixes=None)  # by which triples were selected, and nothing is learnt
    try:
        load_prompts(config.prompts)
        config.own_openings()
    except ConfigError as error:
        raise ConfigError(f"{adapter.name!r} cannot be learnt from anew: {error} Or leave out {NAMES}.") from error
    return replace(config, accumulation=config.accumulation * said.get("processes", 1), report_to="none")


def adapters_objective(
    model: Any, tokenizer: Any, trait: Trait, config: TrainConfig, answers: BaseAnswers
) -> Objective:
    """What the adapter learnt from: the same texts from the same seed, and what the base model says of them."""
    prompts = load_prompts(config.prompts)[0][: config.max_prompts]
    texts = training_texts(model, tokenizer, trait, config, prompts, answers)
    pairs = pairs_to_learn(tokenizer, trait, config, texts, suffixes=config.own_openings(), prompts=prompts)
    return objective_to_learn(model, tokenizer, trait, config, texts, pairs, answers)


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
    kind: str, model: Any, config: TrainConfig, objective: Callable[[], Objective], state: Path
) -> Iterator[LayerDial]:
    """`model` with a LoRA or DoRA fitted to an objective; the model is itself again afterwards.

    Args:
        objective: Makes one for this tuner alone; not asked where the fitting came to its end before.
        state: Folder of the checkpoints, one per kind, from which training that was broken off goes on.
    """
    folder = state / kind
    taught = None if is_fitted(folder) else objective()  # by the base model, before anything is put on it
    model.requires_grad_(False)
    same = config.adapter_config(model.config.get_text_config().num_hidden_layers)
    torch.manual_seed(config.seed)
    peft_model = peft.get_peft_model(model, lora_like(same, dora=kind == "dora"))
    handles = add_dial(peft_model)
    try:
        if taught is None:
            load_fitted(peft_model, folder)
        else:
            of_texts = says_which_pole(objective_weights(config.objective))
            settings = replace(config, lr=LEARNING_RATE * (1 if of_texts else ON_STATES))
            fit(peft_model, taught, settings, folder, resume=True)
        yield LayerDial(peft_model)
    finally:
        for handle in handles:
            handle.remove()
        peft_model.unload()
