"""Train an adapter: two words and a model in, one file out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch

from ipissa.adapter.checkpoint import Adapter, save_adapter
from ipissa.adapter.config import InnerPissaConfig
from ipissa.adapter.convert import from_peft_model
from ipissa.base import describe_base
from ipissa.data.continuations import Continuation, Sampling, sample_continuations
from ipissa.data.pairs import (
    ContrastivePair,
    contrastive_pairs,
    openings_from_continuations,
    openings_from_suffixes,
    read_suffixes,
)
from ipissa.data.personas import Trait
from ipissa.data.prompts import load_prompts
from ipissa.errors import ConfigError
from ipissa.evaluate.yardsticks import measure_yardsticks, pole_preference, response_curve
from ipissa.models import QUANTISED, load_model, resolve_device
from ipissa.steering import attach
from ipissa.train.calibration import calibrate
from ipissa.train.card import write_card
from ipissa.train.config import TrainConfig
from ipissa.train.elicitation import check_targets, elicitation
from ipissa.train.fit import History, fit
from ipissa.train.initialise import select_triples
from ipissa.train.layers import layer_changes
from ipissa.train.objectives.antiparallel import Antiparallel
from ipissa.train.objectives.base import Objective
from ipissa.train.objectives.build import (
    antiparallel_config,
    build_objective,
    contrastive_config,
    objective_weights,
)
from ipissa.train.objectives.contrastive import Contrastive
from ipissa.train.objectives.distill import KINDS, Distillation, Target, build_targets
from ipissa.train.plots import plot_history
from ipissa.train.result import TrainResult
from ipissa.train.run_folder import RunFolder
from ipissa.train.samples import MidwaySamples, peft_samples, samples_table, take_samples

CALIBRATION_PROMPTS = 24
RESPONSE_PROMPTS = 40
SELECTION_PAIRS = 256


def train(config: TrainConfig, output: str | os.PathLike[str], *, resume: bool = False) -> TrainResult:
    """Run the whole recipe and write the adapter to `output`.

    Sample continuations under both personas, compute the teachers' targets once, distil them into
    an adapter, calibrate its range on generated text, and measure it on held-out prompts.

    Args:
        config: Everything that decides the run.
        output: The .safetensors file; the run's folder is beside it, with the ending .run.
        resume: Go on with the broken run in that folder.
    """
    output = checked_output(output)
    if config.dtype in QUANTISED and resolve_device(config.device).type == "cpu":
        raise ConfigError(f"dtype {config.dtype!r} can be trained on CUDA only; use float32 on the CPU.")
    run = RunFolder.open(output, config, resume=resume)
    started = time.monotonic()
    torch.manual_seed(config.seed)
    trait = Trait.from_words(config.positive, config.negative)
    training_prompts, held_out = load_prompts(config.prompts)
    training_prompts, held_out = training_prompts[: config.max_prompts], held_out[: config.held_out]
    suffixes = None if config.suffixes is None else read_suffixes(config.suffixes)
    model, tokenizer = load_model(config.model, device=config.device, dtype=config.dtype)
    base_model = describe_base(model, config.model)
    adapter_config = config.adapter_config(model.config.get_text_config().num_hidden_layers)

    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    continuations = run.once(
        "continuations",
        lambda: sample_continuations(
            model,
            tokenizer,
            trait,
            training_prompts,
            per_prompt=config.continuations,
            seed=config.seed,
            sampling=sampling,
        ),
        [Continuation],
    )
    elicited = elicitation(model, tokenizer, trait)
    pairs = _pairs(tokenizer, trait, training_prompts, continuations, suffixes, config)
    objective = _objective(model, tokenizer, trait, continuations, pairs, config, run)

    peft_model = _wrap(model, adapter_config)
    if config.selection != "top":
        select_triples(peft_model, tokenizer, pairs[:SELECTION_PAIRS], rule=config.selection)
    samples_before = peft_samples(peft_model, tokenizer, trait, held_out)
    midway = MidwaySamples(tokenizer, trait, held_out)
    history = fit(peft_model, objective, config, run.path, resume=resume, callbacks=[midway])
    adapter = from_peft_model(peft_model, base_model=base_model, trait=trait.to_metadata())

    # From here on the adapter runs as users will run it: from its tensors, in phase form.
    model = peft_model.unload()
    test_set = sample_continuations(
        model,
        tokenizer,
        trait,
        held_out,
        per_prompt=config.held_out_continuations,
        sampling=sampling,
        seed=config.seed + 1,
    )
    adapter, flipped = _right_way_round(model, adapter, tokenizer, trait, test_set)
    steered = attach(model, adapter)
    samples_after = take_samples(steered.alpha, model, tokenizer, trait, held_out)
    calibration = calibrate(
        steered, tokenizer, trait, held_out[:CALIBRATION_PROMPTS], seed=config.seed, sampling=sampling
    )
    yardsticks = measure_yardsticks(steered, tokenizer, trait, test_set)
    response = response_curve(steered, tokenizer, trait, _of_first_prompts(test_set, RESPONSE_PROMPTS))
    steered.detach()

    seconds = time.monotonic() - started
    evaluation = {
        "yardsticks": yardsticks.to_dict(),
        "calibration": calibration.to_dict(),
        "response": [asdict(point) for point in response],
        "elicitation": asdict(elicited),
        "samples": samples_after,
        "training": {
            **config.to_dict(),
            "seconds": round(seconds),
            "final_loss": _final_loss(history),
            "flipped": flipped,
        },
    }
    calibrated = replace(adapter, alpha_range=(calibration.low, calibration.high), evaluation=evaluation)
    result = TrainResult(
        save_adapter(calibrated, output), yardsticks, calibration, samples_before, samples_after, history, seconds
    )
    write_card(result, output)
    run.write_table("history.csv", history)
    run.write_table("layers.csv", [asdict(change) for change in layer_changes(adapter)])
    stages = {"before training": samples_before, "midway": midway.samples, "after": samples_after}
    run.write_text("samples.md", samples_table(stages))
    plot_history(history, run.path / "losses.png")
    run.complete()
    return result


def _pairs(
    tokenizer: Any,
    trait: Trait,
    prompts: Sequence[str],
    continuations: Sequence[Continuation],
    suffixes: Sequence[str] | None,
    config: TrainConfig,
) -> list[ContrastivePair]:
    """Contrastive pairs on the user's own openings, or on the sampled answers, cut short."""
    openings = (
        openings_from_continuations(continuations, seed=config.seed)
        if suffixes is None
        else openings_from_suffixes(tokenizer, suffixes, prompts, seed=config.seed)
    )
    return contrastive_pairs(tokenizer, trait, openings)


def _objective(
    model: Any,
    tokenizer: Any,
    trait: Trait,
    continuations: Sequence[Continuation],
    pairs: Sequence[ContrastivePair],
    config: TrainConfig,
    run: RunFolder,
) -> Objective:
    """What the settings ask for, with everything the base model has to say computed now."""
    pad_id = tokenizer.pad_token_id

    def distillation(kind: str) -> Distillation:
        def compute() -> list[Target]:
            return build_targets(
                model,
                tokenizer,
                trait,
                continuations,
                top_k=config.teacher_top_k,
                kind=kind,
                strengths=config.strengths,
                seed=config.seed,
            )

        targets = run.once(f"targets-{kind}", compute, [Target])
        check_targets(targets, trait)
        return Distillation(targets, pad_id=pad_id)

    return build_objective(
        objective_weights(config.objective),
        {
            **{kind: partial(distillation, kind) for kind in KINDS},
            "contrastive": lambda: Contrastive(model, pairs, contrastive_config(config.contrastive), pad_id=pad_id),
            "antiparallel": lambda: Antiparallel(model, pairs, antiparallel_config(config.antiparallel), pad_id=pad_id),
        },
    )


def _right_way_round(
    model: Any, adapter: Adapter, tokenizer: Any, trait: Trait, test_set: Sequence[Continuation]
) -> tuple[Adapter, bool]:
    """The adapter, or its mirror image if that follows the labelled held-out texts, and whether it is that."""
    labelled = _of_first_prompts(test_set, CALIBRATION_PROMPTS)
    steered = attach(model, adapter)
    preference = pole_preference(steered, tokenizer, trait, labelled)
    steered.detach()
    return (adapter.flipped(), True) if preference < 0 else (adapter, False)


def _of_first_prompts(continuations: Sequence[Continuation], count: int) -> list[Continuation]:
    prompts = list(dict.fromkeys(c.prompt for c in continuations))[:count]
    return [c for c in continuations if c.prompt in prompts]


def _final_loss(history: History) -> float:
    return [record["loss"] for record in history if "loss" in record][-1]


def _wrap(model: Any, adapter_config: InnerPissaConfig) -> Any:
    model.requires_grad_(False)
    try:
        return peft.get_peft_model(model, adapter_config)
    except ValueError as error:
        raise ConfigError(f"The adapter cannot be put on this model: {error}") from error


def checked_output(output: str | os.PathLike[str]) -> Path:
    """The output path, refused before hours of training rather than after."""
    path = Path(output)
    if path.suffix != ".safetensors":
        raise ConfigError(f"output {str(path)!r} does not end in .safetensors; name the file to write.")
    if path.is_dir():
        raise ConfigError(f"output {str(path)!r} is a folder; name the file to write.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {str(path)!r} cannot be written: {error}.") from error
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"output {str(path)!r} cannot be written: no permission in {path.parent}.")
    return path
