"""The model of an evaluation and what is sampled from it, kept so that one begun again goes on with the same texts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ipissa.adapter.base_model import weights_digest
from ipissa.adapter.checkpoint import Adapter, AnyAdapter
from ipissa.data.continuations import Continuation, Sampling, sample_continuations
from ipissa.data.items import Dataset
from ipissa.data.pairs import contrastive_pairs, openings_from_continuations
from ipissa.data.personas import Trait
from ipissa.data.prompts import load_evaluation_prompts, load_prompts, spread
from ipissa.errors import ConfigError
from ipissa.evaluate.baselines.tuners import adapters_objective, training_config
from ipissa.evaluate.choices import measure_choices
from ipissa.evaluate.compare import adapter_degradation
from ipissa.evaluate.degradation import PlainText, sample_plain
from ipissa.evaluate.echoes import Echoes, find_echoes
from ipissa.evaluate.held_out import HeldOut
from ipissa.evaluate.methods import Materials, attached
from ipissa.evaluate.report.parts import Parts
from ipissa.evaluate.settings import EvalSettings
from ipissa.evaluate.side_by_side import ToldAndSteered, side_by_side
from ipissa.models import load_model
from ipissa.train.answers import BaseAnswers
from ipissa.train.config import TrainConfig
from ipissa.train.objectives.base import Objective

logger = logging.getLogger(__name__)

TUNING_PROMPTS = 24
PLAIN_PROMPTS = 48
PAIR_PROMPTS = 96
SIDE_BY_SIDE_PROMPTS = 6
STATE = "state"
WEIGHTS = "weights"  # the part that says of which model the others are


def unseen(adapter: AnyAdapter, prompts: Sequence[str]) -> list[str]:
    """Those of the prompts that the adapter did not learn from, as far as its file says what it did learn from.

    Raises:
        ConfigError: fewer than two are left.
    """
    if "training" not in adapter.evaluation:
        return list(prompts)
    path = adapter.evaluation["training"].get("prompts")
    try:
        seen = set(load_prompts(path)[0])
    except ConfigError:
        logger.warning(
            "%r learnt from %s, which is not here: some held-out prompts may be among them.", adapter.name, path
        )
        return list(prompts)
    unseen = [prompt for prompt in prompts if prompt not in seen]
    if len(unseen) < 2:
        raise ConfigError(
            f"{adapter.name!r} learnt from {len(prompts) - len(unseen)} of {len(prompts)} held-out prompts; "
            "give others with --prompts."
        )
    if len(unseen) < len(prompts):
        logger.warning(
            "%d held-out prompts are left out: %r learnt from them.", len(prompts) - len(unseen), adapter.name
        )
    return unseen


class Bench:
    """The model and what is sampled from it, made when first needed: an evaluation that is complete needs neither.

    Texts are kept, so that an evaluation begun again, elsewhere even, goes on with the same ones. What methods learn
    from, and how far they are, is kept until the evaluation is complete.

    Args:
        shared: Folder of answers of the base model that trainings have in common (`BaseAnswers`); it stays.
    """

    def __init__(
        self, adapter: AnyAdapter, settings: EvalSettings, parts: Parts, folder: Path, *, shared: Path | None = None
    ) -> None:
        self.adapter = adapter
        self.settings = settings
        self.parts = parts
        self._state = folder / STATE
        self._shared = shared or self._state
        self.training, tuning, held_out = load_evaluation_prompts(settings.prompts)
        self.tuning = spread(tuning, TUNING_PROMPTS)
        self.held_out = unseen(adapter, held_out)[: settings.held_out]

    @cached_property
    def base(self) -> tuple[Any, Any, Trait]:
        """Model, tokenizer and trait."""
        name = self.settings.model or self.adapter.base_model["name"]
        model, tokenizer = load_model(name, device=self.settings.device, dtype=self.settings.dtype)
        if self.parts.load(WEIGHTS) not in (None, weights_digest(model)):
            raise ConfigError(
                f"The weights of {name} are not those that this evaluation began with; choose another --output, or "
                "delete the folder."
            )
        return model, tokenizer, Trait(**{field.name: self.adapter.trait[field.name] for field in fields(Trait)})

    def check(self, dataset: Dataset | None) -> None:
        """Refuse what would fail after hours: an adapter of another model, and a model that answers no dilemma.

        What passes is the model of this evaluation from then on.

        Raises:
            BaseModelMismatchError, ConfigError: as `attach` and `measure_choices`.
        """
        model, tokenizer, _ = self.base
        with attached(model, self.adapter) as steerer:
            if dataset is not None:
                measure_choices(steerer, tokenizer, dataset, [0.0])
        self.parts.save(WEIGHTS, weights_digest(model))

    @cached_property
    def materials(self) -> Materials:
        """What methods are made from and measured on, all of it sampled here."""
        seed = self.settings.seed
        model, tokenizer, trait = self.base

        def told(name: str, prompts: Sequence[str], seed: int) -> list[Continuation]:
            def sample() -> list[dict[str, Any]]:
                whole = Sampling.whole()
                texts = sample_continuations(model, tokenizer, trait, prompts, per_prompt=1, sampling=whole, seed=seed)
                return [asdict(text) for text in texts]

            return [Continuation(**text) for text in self.parts.once(name, sample)]

        def plain(name: str, prompts: Sequence[str], seed: int) -> list[PlainText]:
            def sample() -> list[dict[str, Any]]:
                return [asdict(text) for text in sample_plain(model, tokenizer, prompts, seed=seed)]

            return [PlainText(**text) for text in self.parts.once(name, sample)]

        def learn() -> tuple[TrainConfig, Callable[[], Objective]]:
            assert isinstance(self.adapter, Adapter)  # `_check`
            config = training_config(self.adapter)
            config = replace(
                config,
                seed=seed,  # with that of the adapter's training, the very texts that it had
                model=self.settings.model or config.model,
                device=self.settings.device,
                dtype=self.settings.dtype,
            )
            answers = BaseAnswers(model, tokenizer, self._shared, config)
            return config, partial(adapters_objective, model, tokenizer, trait, config, answers)

        texts = told("told-training", self.training[:PAIR_PROMPTS], seed)
        openings = openings_from_continuations(texts, seed=seed)
        return Materials(
            model=model,
            tokenizer=tokenizer,
            trait=trait,
            adapter=self.adapter,
            pairs=contrastive_pairs(tokenizer, trait, openings),
            tuning=plain("plain-tuning", self.tuning, seed),
            tuning_told=HeldOut(tokenizer, trait, told("told-tuning", self.tuning, seed)),
            held_out=HeldOut(tokenizer, trait, told("told-held-out", self.held_out, seed + 1)),
            plain=plain("plain-held-out", spread(self.held_out, PLAIN_PROMPTS), seed + 1),
            learn=learn,
            state=self._state,
            seed=seed,
        )

    @cached_property
    def degradation(self) -> float:
        """What other methods are brought to."""
        return float(self.parts.once("degradation", lambda: adapter_degradation(self.materials)))

    @property
    def echoes(self) -> Echoes:
        """Held-out prompts whose texts repeat a persona line."""

        def found() -> Echoes:
            _, tokenizer, trait = self.base
            held_out = self.materials.held_out
            return find_echoes([text for pole in held_out.texts.values() for text in pole], tokenizer, trait)

        return self.parts.once("echoes", found)

    def complete(self) -> None:
        """Remove what only an evaluation that was broken off needs."""
        self.parts.write_settings()
        shutil.rmtree(self._state, ignore_errors=True)

    @property
    def texts(self) -> list[ToldAndSteered]:
        """Told and steered answers side by side."""

        def written() -> list[dict[str, Any]]:
            model, tokenizer, trait = self.base
            with attached(model, self.adapter) as steerer:
                prompts = self.held_out[:SIDE_BY_SIDE_PROMPTS]
                return [asdict(each) for each in side_by_side(steerer.dial, tokenizer, trait, prompts)]

        return [ToldAndSteered(**each) for each in self.parts.once("told-and-steered", written)]
