"""Evaluate an adapter file: yardsticks first, then dilemmas, beside other ways to steer, and a report of it all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from ipissa.adapter.checkpoint import Adapter, AnyAdapter, load_adapter, save_adapter
from ipissa.data.datasets import load_items
from ipissa.data.items import Dataset
from ipissa.errors import ConfigError
from ipissa.evaluate.analysis import TooFewAnswersError, analyse
from ipissa.evaluate.baselines.tuners import training_config
from ipissa.evaluate.bench import Bench
from ipissa.evaluate.best_scale import SCALABLE, Best, measure_at_best
from ipissa.evaluate.compare import Measured, measure_method
from ipissa.evaluate.methods import ADAPTER, LIKE_THE_ADAPTER, TRAINED, VECTORS, vector_adapter
from ipissa.evaluate.null import NullCheck, null_check, null_slopes
from ipissa.evaluate.published import loss_gap
from ipissa.evaluate.report.page import Findings, write_report
from ipissa.evaluate.report.parts import Parts, measured_from_json, measured_to_json
from ipissa.evaluate.settings import MAX_NULL, EvalSettings
from ipissa.models import resolve_device
from ipissa.train.config import TrainConfig
from ipissa.train.fit import check_trainer
from ipissa.train.objectives.build import compares_states, objective_weights
from ipissa.train.objectives.distill import KINDS
from ipissa.train.processes import refuse_launcher


def evaluate(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: EvalSettings,
    *,
    shared: Path | None = None,
) -> Findings:
    """Measure, and write the report to the folder `output`; begun again, it goes on where it was.

    Vectors are computed from pairs of training prompts; trained methods are trained as the adapter was; all are
    brought to the adapter's degradation on a few prompts for tuning. What is reported is measured on held-out
    prompts and on dilemmas, the same for all.

    Args:
        shared: Folder in which trainings and evaluations over one base model keep the texts and teachers they share.

    Raises:
        AdapterFileError, BaseModelMismatchError, ConfigError: before anything is sampled.
    """
    refuse_launcher("An evaluation")
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
    bench = Bench(adapter, settings, Parts(folder, said | settings.described()), folder, shared=shared)
    measured = _all_methods(bench, dataset, folder)
    findings = Findings(
        settings=settings,
        adapter=adapter,
        dataset=dataset,
        measured=measured,
        best=_best(bench, measured),
        tuning=len(bench.tuning),
        texts=bench.texts,
        echoes=bench.echoes,
        null=_null(bench, dataset, measured),
        loss_gap=_loss_gap(Path(path)),
    )
    write_report(findings, folder)
    bench.complete()
    return findings


def recipe(adapter: AnyAdapter) -> dict[str, Any] | None:
    """How an adapter was trained but for the seed and the machine, None where its file does not say."""
    said = adapter.evaluation.get("training", {})
    chosen = {field.name for field in fields(TrainConfig)} - {"seed", "device", "dtype", "report_to"}
    found = {name: value for name, value in said.items() if name in chosen}
    if found and said.get("processes", 1) != 1:
        found["processes"] = said["processes"]  # of which each has batches of its own
    return found or None


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
        config = training_config(adapter)
        if "reft" in needing and compares_states(objective_weights(config.objective)):
            raise ConfigError(
                f"{adapter.name!r} was trained with objective {config.objective!r}, which compares states before those "
                f"that reft edits; leave out reft, or take an adapter of {', '.join(KINDS)}."
            )
        check_trainer(config, resolve_device(settings.device).type)


def _all_methods(bench: Bench, dataset: Dataset | None, folder: Path) -> list[Measured]:
    def measure(method: str) -> dict[str, Any]:
        if method == ADAPTER:
            bench.check(dataset)
        m = bench.materials
        measured = measure_method(method, m, dataset, bench.settings.grid(), degradation=bench.degradation)
        if method in VECTORS and measured.scale is not None:
            served = vector_adapter(VECTORS[method], m).scaled(measured.scale)
            save_adapter(served, folder / "adapters" / f"{method}.safetensors")
        return measured_to_json(measured)

    methods = tqdm([ADAPTER, *bench.settings.baselines], desc="methods", unit="method")
    return [measured_from_json(bench.parts.once(method, partial(measure, method))) for method in methods]


def _best(bench: Bench, measured: Sequence[Measured]) -> list[Best]:
    """Methods that have a scale to choose, each at its own best."""

    def measure(each: Measured) -> dict[str, Any]:
        return measure_at_best(each.method, bench.materials, equal=each.scale if each.equal else None).to_dict()

    scalable = [each for each in measured if each.method in SCALABLE]
    return [Best.from_dict(bench.parts.once(f"best-{each.method}", partial(measure, each))) for each in scalable]


def _null(
    bench: Bench, dataset: Dataset | None, measured: Sequence[Measured]
) -> tuple[NullCheck, pd.DataFrame, float] | None:
    """The null check with the random slopes of every value and the adapter's own, over α in -1, 0 and 1."""
    if dataset is None or not bench.settings.null:
        return None
    try:
        own = analyse(measured[0], dataset).figures["balanced_value"]
    except TooFewAnswersError:  # the report says so
        return None
    random = _random_slopes(bench, dataset)
    return null_check(own, random[random["name"] == dataset.target]), random, own


def _random_slopes(bench: Bench, dataset: Dataset) -> pd.DataFrame:
    """`null_slopes` of every random adapter."""

    def slopes(seed: int, start: float) -> list[dict[str, Any]]:
        return null_slopes(bench.materials, dataset, degradation=bench.degradation, seed=seed, start=start)

    first = MAX_NULL * (1 + bench.settings.seed)  # none that another evaluation or its `random` has
    found: list[dict[str, Any]] = []
    scale = 1.0
    for seed in tqdm(range(first, first + bench.settings.null), desc="random adapters"):
        found += bench.parts.once(f"null-{seed}", partial(slopes, seed, scale))
        if found[-1]["equal"]:
            scale = found[-1]["scale"]  # where the next one begins: it is nearly that
    return pd.DataFrame(found)


def _loss_gap(path: Path) -> float | None:
    """Of the run that made the adapter, where its folder is still beside the file."""
    history = path.with_suffix(".run") / "history.csv"
    return loss_gap(pd.read_csv(history)) if history.exists() else None
