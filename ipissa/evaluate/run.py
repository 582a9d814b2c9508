"""Evaluate an adapter file: sample held-out texts from its base model, and compare it with baselines on them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

from ipissa.adapter.checkpoint import load_adapter
from ipissa.adapter.config import one_of
from ipissa.data.continuations import Sampling, sample_continuations
from ipissa.data.pairs import contrastive_pairs, openings_from_continuations
from ipissa.data.personas import Trait
from ipissa.data.prompts import load_prompts
from ipissa.evaluate.baselines.tuners import TUNERS, distillation_targets, training_config
from ipissa.evaluate.compare import METHODS, QUICK_METHODS, Compared, Materials, attached, compare, markdown
from ipissa.evaluate.side_by_side import side_by_side
from ipissa.models import load_model
from ipissa.train.config import TrainConfig
from ipissa.train.objectives.distill import Target

TUNING_PROMPTS = 24
PAIR_PROMPTS = 96
SIDE_BY_SIDE_PROMPTS = 6


def evaluate(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    baselines: Sequence[str] = QUICK_METHODS,
    model_name: str | None = None,
    prompts: str | None = None,
    held_out: int = 100,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> list[Compared]:
    """Write `yardsticks.json`, `yardsticks.md` and `texts.md` to the folder `output`.

    Vectors are computed from pairs of training prompts and scaled on a few of them; LoRA and DoRA are
    trained as the adapter was. What is reported is measured on held-out prompts, the same for all.

    Raises:
        AdapterFileError, BaseModelMismatchError, ConfigError: before anything is sampled.
    """
    for name in baselines:
        one_of(name, dict.fromkeys(METHODS), name="baseline")
    adapter = load_adapter(path)
    if set(baselines) & set(TUNERS):
        training_config(adapter)  # refused now rather than after the other methods
    trait = Trait(**{field.name: adapter.trait[field.name] for field in fields(Trait)})
    training, test_prompts = load_prompts(prompts)
    model, tokenizer = load_model(model_name or adapter.base_model["name"], device=device, dtype=dtype)

    def sampled(some: Sequence[str], seed: int) -> list:
        return sample_continuations(model, tokenizer, trait, some, per_prompt=1, sampling=Sampling.whole(), seed=seed)

    known = sampled(training[:PAIR_PROMPTS], seed)
    tuning = [c for c in known if c.prompt in training[:TUNING_PROMPTS]]
    pairs = contrastive_pairs(tokenizer, trait, openings_from_continuations(known, seed=seed))
    test = sampled(test_prompts[:held_out], seed + 1)

    @cache
    def learn() -> tuple[TrainConfig, list[Target]]:
        config = training_config(adapter)
        return config, distillation_targets(model, tokenizer, trait, config, training)

    materials = Materials(model, tokenizer, trait, adapter, pairs, tuning, test, learn, seed)
    rows = list(compare(materials, methods=baselines))
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "adapter": adapter.digest,
        "prompts": len(test_prompts[:held_out]),
        "methods": [asdict(row) for row in rows],
    }
    (folder / "yardsticks.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "yardsticks.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    with attached(model, adapter) as dial:
        texts = side_by_side(dial, tokenizer, trait, test_prompts[:SIDE_BY_SIDE_PROMPTS])
    (folder / "texts.md").write_text(texts + "\n", encoding="utf-8")
    return rows
