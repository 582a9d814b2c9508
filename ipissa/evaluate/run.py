"""Evaluate an adapter file: yardsticks first, then dilemmas, beside other ways to steer, and a report of it all."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from ipissa.adapter.checkpoint import Adapter, AnyAdapter, load_adapter, save_adapter
from ipissa.data.continuations import Continuation, Sampling, sample_continuations
from ipissa.data.datasets import load_items
from ipissa.data.items import Dataset
from ipissa.data.pairs import contrastive_pairs, openings_from_continuations
from ipissa.data.personas import Trait
from ipissa.data.prompts import load_prompts, spread
from ipissa.errors import ConfigError
from ipissa.evaluate.analysis import at_poles, item_labels
from ipissa.evaluate.baselines.tuners import distillation_targets, training_config
from ipissa.evaluate.best_scale import SCALABLE, Best, measure_at_best
from ipissa.evaluate.choices import complete
from ipissa.evaluate.compare import Measured, adapter_degradation, measure_method
from ipissa.evaluate.degradation import PlainText, sample_plain
from ipissa.evaluate.held_out import HeldOut
from ipissa.evaluate.methods import ADAPTER, LIKE_THE_ADAPTER, TRAINED, VECTORS, Materials, attached, vector_adapter
from ipissa.evaluate.null import NullCheck, null_check, null_slopes
from ipissa.evaluate.published import loss_gap
from ipissa.evaluate.report.page import Findings, write_report
from ipissa.evaluate.report.parts import Parts, measured_from_json, measured_to_json, records
from ipissa.evaluate.settings import EvalSettings
from ipissa.evaluate.side_by_side import side_by_side
from ipissa.evaluate.slopes import balanced_slope, with_labels
from ipissa.models import load_model
from ipissa.train.config import TrainConfig
from ipissa.train.objectives.distill import Target

logger = logging.getLogger(__name__)

TUNING_PROMPTS = 16
PLAIN_PROMPTS = 48
PAIR_PROMPTS = 96
SIDE_BY_SIDE_PROMPTS = 6
NULL_SEEDS = 1000  # more than any null check draws


def evaluate(path: str | os.PathLike[str], output: str | os.PathLike[str], settings: EvalSettings) -> Findings:
    """Measure, and write the report to the folder `output`; begun again, it goes on where it was.

    Vectors are computed from pairs of training prompts; trained methods are trained as the adapter was; all are
    brought to the adapter's degradation on a few training prompts. What is reported is measured on held-out
    prompts and on dilemmas, the same for all.

    Raises:
        AdapterFileError, BaseModelMismatchError, ConfigError: before anything is sampled.
    """
    adapter = load_adapter(path)
    dataset = None
    if settings.dataset is not None:
        dataset = load_items(
            settings.dataset, target=settings.target, topic=settings.topic, max_items=settings.max_items
        )
    _check(adapter, settings)
    folder = Path(output)
    said = {
        "adapter": adapter.digest,
        "recipe": recipe(adapter),
        "trained_with_seed": adapter.evaluation.get("training", {}).get("seed"),
    }
    bench = _Bench(adapter, settings, Parts(folder, said | settings.described()))
    measured = _all_methods(bench, dataset, folder)
    findings = Findings(
        settings=settings,
        adapter=adapter,
        dataset=dataset,
        measured=measured,
        best=_best(bench, measured),
        texts=bench.parts.once("texts", bench.texts),
        null=_null(bench, dataset, measured),
        loss_gap=_loss_gap(Path(path)),
    )
    write_report(findings, folder)
    return findings


def recipe(adapter: AnyAdapter) -> dict[str, Any] | None:
    """How an adapter was trained but for the seed and the machine, None where its file does not say."""
    said = adapter.evaluation.get("training", {})
    chosen = {field.name for field in fields(TrainConfig)} - {"seed", "device", "dtype", "report_to"}
    return {name: value for name, value in said.items() if name in chosen} or None


def _check(adapter: AnyAdapter, settings: EvalSettings) -> None:
    """Refuse now what would fail after the other methods are measured."""
    needing = sorted(set(settings.baselines) & set(LIKE_THE_ADAPTER))
    if not isinstance(adapter, Adapter):
        if needing or settings.null:
            raise ConfigError(
                f"{adapter.name!r} is a vector, without modules and rank to do the same with; leave out "
                f"{', '.join([*needing, *(['null'] if settings.null else [])])}."
            )
    elif set(needing) & set(TRAINED):
        training_config(adapter)


def _all_methods(bench: _Bench, dataset: Dataset | None, folder: Path) -> list[Measured]:
    def measure(method: str) -> dict[str, Any]:
        m = bench.materials
        measured = measure_method(method, m, dataset, bench.settings.grid(), degradation=bench.degradation)
        if method in VECTORS and measured.scale is not None:
            served = vector_adapter(VECTORS[method], m).scaled(measured.scale)
            save_adapter(served, folder / "adapters" / f"{method}.safetensors")
        return measured_to_json(measured)

    methods = tqdm([ADAPTER, *bench.settings.baselines], desc="methods", unit="method")
    return [measured_from_json(bench.parts.once(method, partial(measure, method))) for method in methods]


def _best(bench: _Bench, measured: Sequence[Measured]) -> list[Best]:
    """Methods that have a scale to choose, each at its own best."""

    def measure(each: Measured) -> dict[str, Any]:
        return measure_at_best(each.method, bench.materials, around=each.scale or 1.0).to_dict()

    scalable = [each for each in measured if each.method in SCALABLE]
    return [Best.from_dict(bench.parts.once(f"best-{each.method}", partial(measure, each))) for each in scalable]


def _null(
    bench: _Bench, dataset: Dataset | None, measured: Sequence[Measured]
) -> tuple[NullCheck, pd.DataFrame, float] | None:
    """The null check with the random slopes and the adapter's own, over α in -1, 0 and 1."""
    if dataset is None or not bench.settings.null:
        return None

    def slopes() -> list[dict[str, Any]]:
        first = NULL_SEEDS * (1 + bench.settings.seed)  # none that another evaluation or its `random` has
        seeds = range(first, first + bench.settings.null)
        return records(null_slopes(bench.materials, dataset, degradation=bench.degradation, seeds=seeds))

    random = pd.DataFrame(bench.parts.once("null", slopes))
    rows = measured[0].rows
    assert rows is not None
    labels = item_labels(dataset)[dataset.target]
    own = balanced_slope(with_labels(complete(at_poles(rows)), labels)).trait.value
    return null_check(own, random), random, own


def _loss_gap(path: Path) -> float | None:
    """Of the run that made the adapter, where its folder is still beside the file."""
    history = path.with_suffix(".run") / "history.csv"
    return loss_gap(pd.read_csv(history)) if history.exists() else None


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


class _Bench:
    """The model and what is sampled from it, made when first needed: an evaluation that is complete needs neither.

    Texts are kept, so that an evaluation begun again, elsewhere even, goes on with the same ones.
    """

    def __init__(self, adapter: AnyAdapter, settings: EvalSettings, parts: Parts) -> None:
        self.adapter = adapter
        self.settings = settings
        self.parts = parts
        self.training, held_out = load_prompts(settings.prompts)
        self.held_out = unseen(adapter, held_out)[: settings.held_out]

    @cached_property
    def base(self) -> tuple[Any, Any, Trait]:
        """Model, tokenizer and trait."""
        name = self.settings.model or self.adapter.base_model["name"]
        model, tokenizer = load_model(name, device=self.settings.device, dtype=self.settings.dtype)
        return model, tokenizer, Trait(**{field.name: self.adapter.trait[field.name] for field in fields(Trait)})

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

        @cache
        def learn() -> tuple[TrainConfig, list[Target]]:
            assert isinstance(self.adapter, Adapter)  # `_check`
            config = training_config(self.adapter)
            config = replace(config, seed=config.seed + seed)  # with --seed 0, the very texts that the adapter had
            return config, distillation_targets(model, tokenizer, trait, config, load_prompts(config.prompts)[0])

        texts = told("told-training", self.training[:PAIR_PROMPTS], seed)
        openings = openings_from_continuations(texts, seed=seed)
        some = set(self.training[:TUNING_PROMPTS])
        return Materials(
            model=model,
            tokenizer=tokenizer,
            trait=trait,
            adapter=self.adapter,
            pairs=contrastive_pairs(tokenizer, trait, openings),
            tuning=plain("plain-training", self.training[:TUNING_PROMPTS], seed),
            tuning_told=HeldOut(tokenizer, trait, [text for text in texts if text.prompt in some]),
            held_out=HeldOut(tokenizer, trait, told("told-held-out", self.held_out, seed + 1)),
            plain=plain("plain-held-out", spread(self.held_out, PLAIN_PROMPTS), seed + 1),
            learn=learn,
            seed=seed,
        )

    @cached_property
    def degradation(self) -> float:
        """What other methods are brought to."""
        return float(self.parts.once("degradation", lambda: adapter_degradation(self.materials)))

    def texts(self) -> str:
        """Told and steered answers side by side, in Markdown."""
        model, tokenizer, trait = self.base
        with attached(model, self.adapter) as steerer:
            return side_by_side(steerer.dial, tokenizer, trait, self.held_out[:SIDE_BY_SIDE_PROMPTS])
