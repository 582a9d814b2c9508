"""Sample what the base model says under each persona: the raw material of distillation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ipissa.data.chat import chat_ids
from ipissa.data.personas import Trait
from ipissa.errors import NotFiniteError, TrainingError
from ipissa.models import end_token_ids
from ipissa.sampling import apply_temperature, keep_top_p

logger = logging.getLogger(__name__)
SAMPLE_BATCH = 48
MIN_TOKENS = 4


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn."""

    max_new_tokens: int = 32
    temperature: float = 0.8
    top_p: float = 0.95

    @classmethod
    def whole(cls, max_new_tokens: int = 32) -> Sampling:
        """From the model's whole distribution, nothing sharpened and nothing cut: what yardsticks are read on."""
        return cls(max_new_tokens, temperature=1.0, top_p=1.0)

    def settings(self) -> dict[str, Any]:
        """Settings for `generate_ids`."""
        nucleus = LogitsProcessorList([_Nucleus(self)])
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, "top_k": 0, "processors": nucleus}

    def kept(self, logits: Tensor) -> Tensor:
        """The logits (rows, vocab) that a token is drawn from: at the temperature, -inf outside the nucleus."""
        rows = logits.float().new_ones(logits.shape[0])
        return keep_top_p(apply_temperature(logits.float(), rows * self.temperature), rows * self.top_p)


@dataclass(frozen=True)
class Continuation:
    """What the model said to `prompt` under one pole's persona."""

    prompt: str
    pole: int  # +1 or -1
    tokens: list[int]


def sample_continuations(
    model: Any,
    tokenizer: Any,
    trait: Trait,
    prompts: Sequence[str],
    *,
    per_prompt: int,
    sampling: Sampling,
    seed: int,
) -> list[Continuation]:
    """Continuations of every prompt under both poles, `per_prompt` of each, ordered by prompt then pole."""
    jobs = [(prompt, pole) for prompt in prompts for pole in (1, -1) for _ in range(per_prompt)]
    ids = {(prompt, pole): chat_ids(tokenizer, trait.messages(prompt, pole)) for prompt, pole in set(jobs)}
    # Batches of similar length waste little padding; the result is put back in order.
    order = sorted(range(len(jobs)), key=lambda i: len(ids[jobs[i]]))
    found: dict[int, Continuation] = {}
    with seeded(model, seed), tqdm(total=len(jobs), desc="sampling", unit="text") as bar:
        for start in range(0, len(jobs), SAMPLE_BATCH):
            batch = order[start : start + SAMPLE_BATCH]
            texts = generate_ids(
                model,
                tokenizer,
                [ids[jobs[i]] for i in batch],
                **sampling.settings(),
            )
            for i, tokens in zip(batch, texts, strict=True):
                found[i] = Continuation(*jobs[i], tokens)
            bar.update(len(batch))
    kept = [found[i] for i in range(len(jobs)) if len(found[i].tokens) >= MIN_TOKENS]
    if len(kept) < len(jobs):
        logger.warning(
            "%d of %d sampled texts have fewer than %d tokens and are left out.",
            len(jobs) - len(kept), len(jobs), MIN_TOKENS,
        )  # fmt: skip
    for pole in (1, -1):
        usable = sum(c.pole == pole for c in kept)
        if usable < len(jobs) / 4:
            raise TrainingError(
                f"Only {usable} of {len(jobs) // 2} texts sampled as {trait.persona(pole)} person have {MIN_TOKENS} "
                "tokens or more; the model does not answer these prompts, so give others with --prompts."
            )
    return kept


class _Nucleus(LogitsProcessor):
    """Temperature and top-p without sorting the vocabulary at every token, which is most of the time on a CPU."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._sampling.kept(scores)


class _Finite(LogitsProcessor):
    """Refuses predictions to which no distribution belongs; tokens that cannot be said may be at -inf."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.max(-1).values.isfinite().all():
            raise NotFiniteError(
                f"What the model predicts in {str(scores.dtype).removeprefix('torch.')} is not finite; use --dtype "
                "bfloat16 or float32."
            )
        return scores


@torch.no_grad()
def generate_ids(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[list[int]],
    *,
    processors: LogitsProcessorList | None = None,
    **settings: Any,
) -> list[list[int]]:
    """Continue each context with `model.generate`; token ids up to and including the end token.

    `settings` are those of `GenerationConfig`, and the only ones in force.

    Raises:
        NotFiniteError: what the model predicts is not finite.
    """
    batch = tokenizer.pad({"input_ids": list(contexts)}, padding_side="left", return_tensors="pt").to(model.device)
    ends = end_token_ids(model.generation_config, tokenizer)
    ours = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id, **settings)
    finite = LogitsProcessorList([_Finite(), *(processors or [])])
    with _no_settings_of_its_own(model):
        output = model.generate(**batch, generation_config=ours, logits_processor=finite)
    return [_until_end(row, ends) for row in output[:, batch["input_ids"].shape[1] :].tolist()]


@contextmanager
def _no_settings_of_its_own(model: Any) -> Iterator[None]:
    """`generate` takes what it is not told (temperature, repetition penalty, ...) from the model; so it has none."""
    # A PEFT model hands its settings to the model inside, for good.
    models = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    before = [each.generation_config for each in models]
    for each in models:
        each.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for each, own in zip(models, before, strict=True):
            each.generation_config = own


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


@contextmanager
def seeded(model: Any, seed: int) -> Iterator[None]:
    """Draw from `seed` on the model's device inside the block, and go on as before after it."""
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
