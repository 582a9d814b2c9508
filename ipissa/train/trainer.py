"""Train an adapter: two words and a model in, one file out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch

from ipissa.adapter.checkpoint import Adapter, save_adapter
from ipissa.adapter.config import InnerPissaConfig
from ipissa.adapter.convert import from_peft_model
from ipissa.adapter.model import layer_alpha
from ipissa.base import describe_base
from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation, Sampling, generate_ids, sample_continuations
from ipissa.data.pairs import contrastive_pairs, openings_from_continuations
from ipissa.data.personas import Trait
from ipissa.data.prompts import load_prompts
from ipissa.errors import ConfigError
from ipissa.evaluate.yardsticks import Yardsticks, measure_yardsticks
from ipissa.models import load_model
from ipissa.steering import attach
from ipissa.train.activations import select_triples
from ipissa.train.calibration import Calibration, calibrate
from ipissa.train.config import TrainConfig
from ipissa.train.fit import History, fit
from ipissa.train.objectives.distill import Distillation, Target, build_targets
from ipissa.train.plots import plot_history
from ipissa.train.run_folder import RunFolder

SAMPLE_PROMPTS = 4
SAMPLE_TOKENS = 40
CALIBRATION_PROMPTS = 24
SELECTION_PAIRS = 256
Samples = dict[str, dict[str, str]]  # prompt -> α -> text


@dataclass(frozen=True)
class TrainResult:
    """What a run produced, besides the file."""

    adapter: Adapter
    yardsticks: Yardsticks
    calibration: Calibration
    samples_before: Samples
    samples_after: Samples
    history: History
    seconds: float


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
    run = RunFolder.open(output, config, resume=resume)
    started = time.monotonic()
    torch.manual_seed(config.seed)
    trait = Trait.from_words(config.positive, config.negative)
    training_prompts, held_out = load_prompts(config.prompts)
    training_prompts, held_out = training_prompts[: config.max_prompts], held_out[: config.held_out]
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
    targets = run.once("targets", lambda: _targets(model, tokenizer, trait, continuations, config), [Target])
    objective = Distillation(targets, pad_id=tokenizer.pad_token_id)

    peft_model = _wrap(model, adapter_config)
    if config.selection != "top":
        openings = openings_from_continuations(continuations, seed=config.seed)[:SELECTION_PAIRS]
        pairs = contrastive_pairs(tokenizer, trait, openings)
        select_triples(peft_model, tokenizer, pairs, rule=config.selection)
    samples_before = _peft_samples(peft_model, tokenizer, trait, held_out)
    history = fit(peft_model, objective, config, run.path, resume=resume)
    adapter = from_peft_model(peft_model, base_model=base_model, trait=trait.to_metadata())

    # From here on the adapter runs as users will run it: from its tensors, in phase form.
    model = peft_model.unload()
    steered = attach(model, adapter)
    samples_after = _samples(steered.alpha, model, tokenizer, trait, held_out)
    calibration = calibrate(
        steered, tokenizer, trait, held_out[:CALIBRATION_PROMPTS], seed=config.seed, sampling=sampling
    )
    test_set = sample_continuations(
        model,
        tokenizer,
        trait,
        held_out,
        per_prompt=config.held_out_continuations,
        sampling=sampling,
        seed=config.seed + 1,
    )
    yardsticks = measure_yardsticks(steered, tokenizer, trait, test_set)
    steered.detach()

    seconds = time.monotonic() - started
    evaluation = {
        "yardsticks": yardsticks.to_dict(),
        "calibration": calibration.to_dict(),
        "samples": samples_after,
        "training": {**config.to_dict(), "seconds": round(seconds), "final_loss": _final_loss(history)},
    }
    calibrated = replace(adapter, alpha_range=(calibration.low, calibration.high), evaluation=evaluation)
    result = TrainResult(
        save_adapter(calibrated, output), yardsticks, calibration, samples_before, samples_after, history, seconds
    )
    run.write_history(history)
    plot_history(history, run.path / "losses.png")
    run.complete()
    return result


def _targets(
    model: Any, tokenizer: Any, trait: Trait, continuations: Sequence[Continuation], config: TrainConfig
) -> list[Target]:
    return build_targets(
        model,
        tokenizer,
        trait,
        continuations,
        top_k=config.teacher_top_k,
        kind=config.objective,
        strengths=config.strengths,
        seed=config.seed,
    )


def _final_loss(history: History) -> float:
    return [record["loss"] for record in history if "loss" in record][-1]


def _wrap(model: Any, adapter_config: InnerPissaConfig) -> Any:
    model.requires_grad_(False)
    try:
        return peft.get_peft_model(model, adapter_config)
    except ValueError as error:
        raise ConfigError(f"The adapter cannot be put on this model: {error}") from error


def _peft_samples(peft_model: Any, tokenizer: Any, trait: Trait, prompts: Sequence[str]) -> Samples:
    return _samples(lambda alpha: layer_alpha(peft_model, torch.tensor(alpha)), peft_model, tokenizer, trait, prompts)


def _samples(at_alpha: Any, model: Any, tokenizer: Any, trait: Trait, prompts: Sequence[str]) -> Samples:
    """Greedy answers at α = -1, 0, +1, in one batch per prompt."""
    alphas = [-1.0, 0.0, 1.0]
    samples: Samples = {}
    for prompt in prompts[:SAMPLE_PROMPTS]:
        context = chat_ids(tokenizer, trait.messages(prompt, None))
        with at_alpha(alphas):
            answers = generate_ids(
                model, tokenizer, [context] * len(alphas), max_new_tokens=SAMPLE_TOKENS, do_sample=False
            )
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        samples[prompt] = {f"{alpha:+g}": text.strip() for alpha, text in zip(alphas, texts, strict=True)}
    return samples


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
