"""What a model writes at -1, 0 and +1, before, during and after training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ipissa.adapter.model import layer_alpha
from ipissa.data.chat import chat_ids
from ipissa.data.continuations import generate_ids
from ipissa.data.personas import Trait
from ipissa.evaluate.side_by_side import cell
from ipissa.files import write_text

ALPHAS = [-1.0, 0.0, 1.0]
SAMPLE_PROMPTS = 4
SAMPLE_TOKENS = 40
Samples = dict[str, dict[str, str]]  # prompt -> α -> text


def take_samples(
    at_alpha: Callable[[Any], AbstractContextManager[Any]],
    model: Any,
    tokenizer: Any,
    trait: Trait,
    prompts: Sequence[str],
) -> Samples:
    """Greedy answers to the first prompts at every α, in one batch per prompt.

    Args:
        at_alpha: Steers the model at one α per row, as a context manager.
    """
    samples: Samples = {}
    for prompt in prompts[:SAMPLE_PROMPTS]:
        context = chat_ids(tokenizer, trait.messages(prompt, None))
        with at_alpha(ALPHAS):
            answers = generate_ids(
                model, tokenizer, [context] * len(ALPHAS), max_new_tokens=SAMPLE_TOKENS, do_sample=False
            )
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        samples[prompt] = {f"{alpha:+g}": text.strip() for alpha, text in zip(ALPHAS, texts, strict=True)}
    return samples


def peft_samples(peft_model: Any, tokenizer: Any, trait: Trait, prompts: Sequence[str]) -> Samples:
    """`take_samples` of an adapter in training."""
    return take_samples(
        lambda alpha: layer_alpha(peft_model, torch.tensor(alpha)), peft_model, tokenizer, trait, prompts
    )


def flipped_samples(samples: Samples) -> Samples:
    """What was written at α under -α, for an adapter whose poles have changed places."""
    return {prompt: dict(zip(texts, reversed(texts.values()), strict=True)) for prompt, texts in samples.items()}


class MidwaySamples(TrainerCallback):
    """Takes samples at half of the steps, and keeps them for a run that is resumed after it.

    Args:
        kept: File that they are kept in.
    """

    def __init__(self, tokenizer: Any, trait: Trait, prompts: Sequence[str], *, kept: Path) -> None:
        self._arguments = (tokenizer, trait, prompts)
        self._kept = kept

    @property
    def samples(self) -> Samples:
        """Empty where the run was never there."""
        return json.loads(self._kept.read_text(encoding="utf-8")) if self._kept.exists() else {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step == max(1, state.max_steps // 2):
            model.eval()
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._kept, json.dumps(peft_samples(model, *self._arguments)))
            model.train()


def samples_table(stages: Mapping[str, Samples]) -> str:
    """What the model wrote at each α, in Markdown, one column per stage of training."""
    stages = {stage: samples for stage, samples in stages.items() if samples}
    lines = ["## Samples (greedy)"]
    for prompt, texts in next(iter(stages.values())).items():
        lines += ["", f"**{prompt}**", "", f"| α | {' | '.join(stages)} |", "|-|" + "-|" * len(stages)]
        for alpha in texts:
            lines.append(f"| {alpha} | {' | '.join(cell(samples[prompt][alpha]) for samples in stages.values())} |")
    return "\n".join(lines)
