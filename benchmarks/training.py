"""What a training step costs, against a plain LoRA fine-tuning step on the same rows, rank and modules.

    guided        every row at its own α, -1 or +1
    contrastive   every row at -1 and at +1, against what was recorded at 0: three α
    antiparallel  the same, of whose next tokens the whole distribution counts

Peak memory is that of a process of its own, the model included.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from ipissa.data.activations import pad_pairs
from ipissa.data.continuations import Continuation, sample_continuations
from ipissa.data.pairs import ContrastivePair, contrastive_pairs, openings_from_continuations
from ipissa.data.personas import Trait
from ipissa.data.prompts import load_prompts
from ipissa.evaluate.baselines.tuners import lora_like
from ipissa.models import load_model
from ipissa.sequences import PaddedBatch, continuation_logprobs, target_logprobs
from ipissa.train.config import TrainConfig
from ipissa.train.fit import attention_for
from ipissa.train.objectives.antiparallel import Antiparallel, AntiparallelConfig
from ipissa.train.objectives.base import Batch
from ipissa.train.objectives.contrastive import Contrastive, ContrastiveConfig
from ipissa.train.objectives.distill import Distillation, build_targets

from .timing import Ratio, seconds, speed_ratios

PROMPTS = 6  # with one text per pole: 12 rows
PAIR_PROMPTS = 60  # what the losses on states are prepared from: in which directions personas differ, few do not show
STEPS_AT_PEAK = 3
OF_PAIRS: dict[str, tuple[Any, Any]] = {
    "contrastive": (Contrastive, ContrastiveConfig()),
    "antiparallel": (Antiparallel, AntiparallelConfig()),
}
LORA_ON = "lora on "
KINDS = ("guided", *OF_PAIRS)
CONFIG = TrainConfig("kind, loving", "angry, hateful")
TRAIT = Trait.from_words(CONFIG.positive, CONFIG.negative)


def training_table(dtype: str, rounds: int) -> Iterator[Ratio]:
    """All rows of the table, as they are measured."""
    rows = _Rows.sample(dtype)
    for kind in KINDS:
        ours, lora = rows.step(kind, dtype), rows.step(f"{LORA_ON}{kind}", dtype)
        values = speed_ratios(lora.seconds, ours.seconds, rounds)
        yield Ratio(f"{kind} step / LoRA step, seconds", values, at_most=2.6)
    for kind in KINDS:
        peaks = [_peak_of(name, dtype) for name in (kind, f"{LORA_ON}{kind}")]
        yield Ratio(f"{kind} step / LoRA step, peak memory", [peaks[0] / peaks[1]], at_most=1.6)


@dataclass(frozen=True)
class _Rows:
    """The texts that every kind of step reads."""

    continuations: list[Continuation]
    pairs: list[ContrastivePair]
    pad_id: int

    @classmethod
    def sample(cls, dtype: str) -> _Rows:
        model, tokenizer = load_model(CONFIG.model, dtype=dtype)
        prompts = load_prompts()[0][:PAIR_PROMPTS]
        texts = sample_continuations(model, tokenizer, TRAIT, prompts, per_prompt=1, sampling=CONFIG.sampling(), seed=0)
        pairs = contrastive_pairs(tokenizer, TRAIT, openings_from_continuations(texts, seed=0))
        of_a_step = [text for text in texts if text.prompt in prompts[:PROMPTS]]
        return cls(of_a_step, pairs, tokenizer.pad_token_id)

    def step(self, kind: str, dtype: str) -> _Step:
        model, tokenizer = load_model(CONFIG.model, dtype=dtype)
        asked = OF_PAIRS.get(kind.removeprefix(LORA_ON))
        if asked is not None:
            make, config = asked
            objective: Any = make(model, self.pairs, config, pad_id=self.pad_id)
            of_a_step = self.pairs[:PROMPTS]  # two rows each
            plain = vars(pad_pairs(of_a_step, pad_id=self.pad_id, device=torch.device("cpu")))
        else:
            targets = build_targets(model, tokenizer, TRAIT, self.continuations, **CONFIG.target_settings())
            objective = Distillation(targets, pad_id=self.pad_id)
            plain = {}
        batch = objective.collate(objective.examples(objective.prompts)[:PROMPTS])
        model.requires_grad_(False)
        if kind.startswith(LORA_ON):
            return _Step(
                peft.get_peft_model(model, lora_like(_adapter_config(model))), _LanguageModelling(), plain or batch
            )
        ours = peft.get_peft_model(model, _adapter_config(model))
        return _Step(ours, objective, batch, around=lambda: attention_for(objective, ours))  # as in training


class _LanguageModelling:
    """Ordinary fine-tuning: the mean log-likelihood of the texts."""

    def loss(self, model: Any, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        padded = PaddedBatch.taken_from(batch)
        logp = target_logprobs(continuation_logprobs(model, padded), padded)  # as plain training has it, at full memory
        return -logp.sum() / padded.mask.sum(), {}


class _Step:
    """One optimiser step, again and again on the same batch."""

    def __init__(
        self,
        model: Any,
        objective: Any,
        batch: Batch,
        *,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._around = around
        device = next(model.parameters()).device
        self._model, self._objective = model, objective
        self._batch = {name: value.to(device) for name, value in batch.items()}
        self._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def take(self) -> None:
        with self._around():
            loss, _ = self._objective.loss(self._model, self._batch, 0.5)
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        float(loss.detach())  # waits for the device

    def seconds(self) -> float:
        return seconds(self.take)


def _adapter_config(model: Any) -> Any:
    return CONFIG.adapter_config(model.config.num_hidden_layers)


def _peak_of(kind: str, dtype: str) -> float:
    """Peak memory of a few steps, in bytes, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training", kind, dtype]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


def _print_peak(arguments: Sequence[str]) -> None:
    kind, dtype = arguments
    step = _Rows.sample(dtype).step(kind, dtype)
    # What was needed to prepare the step does not count.
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS_AT_PEAK):
        step.take()
    print(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_resident_memory())


def _peak_resident_memory() -> int:
    """Bytes, since the peak was last cleared; Linux only."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    _print_peak(sys.argv[1:])
