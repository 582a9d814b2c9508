"""Train an adapter: two words and a model in, one file out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from tqdm import tqdm

from ipissa.adapter.checkpoint import Adapter, save_adapter
from ipissa.adapter.config import InnerPissaConfig
from ipissa.adapter.convert import from_peft_model
from ipissa.adapter.model import layer_alpha
from ipissa.base import describe_base
from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Sampling, generate_ids, sample_continuations
from ipissa.data.personas import Trait
from ipissa.data.prompts import load_prompts
from ipissa.errors import ConfigError, TrainingError
from ipissa.evaluate.yardsticks import Yardsticks, measure_yardsticks
from ipissa.models import load_model
from ipissa.sequences import continuation_logprobs, pad_batch
from ipissa.steering import attach
from ipissa.train.calibration import Calibration, calibrate
from ipissa.train.config import TrainConfig
from ipissa.train.distill import Target, balanced_batches, build_targets, distillation_loss, pole_weights

SAMPLE_PROMPTS = 4
SAMPLE_TOKENS = 40
CALIBRATION_PROMPTS = 24
LOG_EVERY = 20
MIN_SCHEDULE = 10  # steps; one-cycle has no shape below
Samples = dict[str, dict[str, str]]  # prompt -> α -> text


@dataclass(frozen=True)
class TrainResult:
    """What a run produced, besides the file."""

    adapter: Adapter
    yardsticks: Yardsticks
    calibration: Calibration
    samples_before: Samples
    samples_after: Samples
    losses: list[dict[str, float]]
    seconds: float


def train(config: TrainConfig, output: str | os.PathLike[str]) -> TrainResult:
    """Run the whole recipe and write the adapter to `output`.

    Sample continuations under both personas, compute the teachers' targets once, distil them into
    an adapter, calibrate its range on generated text, and measure it on held-out prompts.
    """
    output = checked_output(output)
    started = time.monotonic()
    torch.manual_seed(config.seed)
    trait = Trait.from_words(config.positive, config.negative)
    training_prompts, held_out = load_prompts(config.prompts)
    held_out = held_out[: config.held_out]
    model, tokenizer = load_model(config.model, device=config.device, dtype=config.dtype)
    base_model = describe_base(model, config.model)
    adapter_config = config.adapter_config(model.config.get_text_config().num_hidden_layers)

    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    continuations = sample_continuations(
        model, tokenizer, trait, training_prompts, per_prompt=config.continuations, seed=config.seed, sampling=sampling
    )
    targets = build_targets(model, tokenizer, trait, continuations, top_k=config.teacher_top_k)

    peft_model = _wrap(model, adapter_config)
    samples_before = _peft_samples(peft_model, tokenizer, trait, held_out)
    losses = fit(peft_model, tokenizer, targets, config)
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
        "training": {**config.to_dict(), "seconds": round(seconds), "final_loss": losses[-1]["loss"]},
    }
    calibrated = replace(adapter, alpha_range=(calibration.low, calibration.high), evaluation=evaluation)
    adapter = save_adapter(calibrated, output)
    return TrainResult(adapter, yardsticks, calibration, samples_before, samples_after, losses, seconds)


def fit(peft_model: Any, tokenizer: Any, targets: Sequence[Target], config: TrainConfig) -> list[dict[str, float]]:
    """Distil `targets` into the adapter's parameters, in place; returns the loss per step.

    Rows of both poles share a batch, each row at its own α = ±1, and count by `pole_weights`.
    """
    steps = max(1, round(config.epochs * len(targets) / config.batch_size))
    parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.lr, total_steps=max(steps + 1, MIN_SCHEDULE), pct_start=0.2
    )
    batches = balanced_batches(targets, batch_size=config.batch_size, seed=config.seed)
    weights = pole_weights(targets)
    history: list[dict[str, float]] = []
    peft_model.train()
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for batch in islice(batches, steps):
            per_row = _row_losses(peft_model, tokenizer, batch)
            optimizer.zero_grad()
            (per_row * per_row.new_tensor([weights[t.pole] for t in batch])).mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            if not torch.isfinite(norm):
                raise TrainingError(f"The gradient is not finite at step {len(history) + 1}; use a lower --lr.")
            optimizer.step()
            schedule.step()
            history.append(_record(len(history) + 1, per_row, batch))
            recent = history[-LOG_EVERY:]
            bar.set_postfix({k: f"{_mean(recent, k):.4f}" for k in ("loss", "positive", "negative")}, refresh=False)
            bar.update()
    peft_model.eval()
    return history


def _row_losses(peft_model: Any, tokenizer: Any, batch: Sequence[Target]) -> Tensor:
    device = next(peft_model.parameters()).device
    padded = pad_batch(
        [t.context for t in batch], [t.tokens for t in batch], pad_id=tokenizer.pad_token_id, device=device
    )
    alpha = torch.tensor([float(t.pole) for t in batch], device=device)
    with layer_alpha(peft_model, alpha):
        return distillation_loss(continuation_logprobs(peft_model, padded), batch)


def _record(step: int, per_row: Tensor, batch: Sequence[Target]) -> dict[str, float]:
    losses = per_row.detach().tolist()
    sides = {pole: [loss for loss, t in zip(losses, batch, strict=True) if t.pole == pole] for pole in (1, -1)}
    return {
        "step": step,
        "loss": sum(losses) / len(losses),
        "positive": sum(sides[1]) / len(sides[1]),
        "negative": sum(sides[-1]) / len(sides[-1]),
    }


def _mean(records: Sequence[dict[str, float]], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


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
