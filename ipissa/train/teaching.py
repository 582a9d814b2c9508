"""What there is to learn: pairs of contexts and the objective that settings ask for, as the base model says it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ipissa.data.continuations import Continuation
from ipissa.data.pairs import (
    ContrastivePair,
    contrastive_pairs,
    openings_from_continuations,
    openings_from_suffixes,
)
from ipissa.data.personas import Trait
from ipissa.train.answers import BaseAnswers, training_targets
from ipissa.train.config import TrainConfig
from ipissa.train.objectives.antiparallel import Antiparallel
from ipissa.train.objectives.base import Objective
from ipissa.train.objectives.build import (
    antiparallel_config,
    build_objective,
    contrastive_config,
    objective_weights,
)
from ipissa.train.objectives.contrastive import Contrastive
from ipissa.train.objectives.distill import KINDS, Distillation


def pairs_to_learn(
    tokenizer: Any,
    trait: Trait,
    config: TrainConfig,
    texts: Sequence[Continuation],
    *,
    suffixes: Sequence[str] | None,
    prompts: Sequence[str],
) -> list[ContrastivePair]:
    """Contrastive pairs on the user's own `suffixes`, each put to one of the prompts, or on the texts, cut short."""
    openings = (
        openings_from_continuations(texts, seed=config.seed)
        if suffixes is None
        else openings_from_suffixes(tokenizer, suffixes, prompts, seed=config.seed)
    )
    return contrastive_pairs(tokenizer, trait, openings)


def objective_to_learn(
    model: Any,
    tokenizer: Any,
    trait: Trait,
    config: TrainConfig,
    texts: Sequence[Continuation],
    pairs: Sequence[ContrastivePair],
    answers: BaseAnswers,
) -> Objective:
    """What the settings ask for, with everything the base model has to say computed now.

    Args:
        model: The base model, with nothing attached to it.
    """
    weights = objective_weights(config.objective)
    pad_id = tokenizer.pad_token_id
    contrastive = contrastive_config(config.contrastive, beside=weights)
    antiparallel = antiparallel_config(config.antiparallel, beside=weights)

    def distillation(kind: str) -> Distillation:
        return Distillation(training_targets(model, tokenizer, trait, config, texts, kind, answers), pad_id=pad_id)

    return build_objective(
        weights,
        {
            **{kind: partial(distillation, kind) for kind in KINDS},
            "contrastive": lambda: Contrastive(model, pairs, contrastive, pad_id=pad_id),
            "antiparallel": lambda: Antiparallel(model, pairs, antiparallel, pad_id=pad_id),
        },
    )
