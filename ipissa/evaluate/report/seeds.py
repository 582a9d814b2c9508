"""One evaluation over several seeds: medians with their range and count, as only they are worth quoting.

A seed redraws texts, and makes random and trained methods anew. That says how much an adapter depends on its own seed
only where every evaluation has an adapter of its own, trained by one recipe with other seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ipissa.errors import ConfigError
from ipissa.evaluate.methods import ADAPTER
from ipissa.evaluate.null import USABLE, comparable, median_p, null_check
from ipissa.evaluate.report.parts import SETTINGS
from ipissa.evaluate.report.shown import PUBLISHED
from ipissa.evaluate.settings import dataset_name
from ipissa.files import write_text
from ipissa.train.config import TrainConfig

ENOUGH_SEEDS = 3
MACHINE = ("device", "dtype")  # settings that a machine chooses
WORSE = "trait_gain worse"  # of the two poles
AT_BEST = " at best"
FIRST_SHOWS = "first_shows"  # share of the dilemmas that list the action first that shows the target
MORE = "adapter_more"  # by how much the adapter's trait gain is above, over the same prompts
FIGURES = {
    "yardsticks": ("trait_gain", "without_echoes", "plain_gain", "contrast", MORE),
    "best": ("trait_gain", "without_echoes", MORE),
    "methods": (
        "balanced_value", "balanced_t", "balanced_p", "acquiescence_value", "published_effect", "published_gain",
        "steering_f1", "steering_swapped", "transfer", "symmetry", "dose_monotonic", "base_difference", "kept",
    ),
}  # fmt: skip


def summarise_seeds(folders: Sequence[Path], output: Path) -> str:
    """Write `medians.csv`, `medians.json` and `medians.md` to `output`; returns the Markdown.

    Args:
        folders: Of `ipissa eval`, with the same settings but for the seed, of one adapter or of one recipe. They may
            come from several machines, which is said: a figure is of what was measured beside it, in one dtype.

    Raises:
        ConfigError: one is no evaluation, or they differ in more than the seed.
    """
    settings = [_settings(folder) for folder in folders]
    adapters = _check_same(folders, settings)
    each = [_figures(folder) for folder in folders]
    medians = (
        pd.concat(each, ignore_index=True)
        .groupby(["method", "figure"], sort=False)
        .agg(
            median=("value", "median"),
            lowest=("value", "min"),
            highest=("value", "max"),
            seeds=("value", "count"),
            above=("above", _count),
            below=("below", _count),
        )
        .reset_index()
    )
    facts = {
        "seeds": len(folders),
        "adapters": adapters,
        **_asked(folders, settings[0]),
        **_computed_in(settings),
        **_chance(folders, each, adapters),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "medians.csv", medians.to_csv(index=False))
    write_text(output / "medians.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    text = _markdown(medians, facts)
    write_text(output / "medians.md", text + "\n")
    return text


def _settings(folder: Path) -> dict[str, Any]:
    """What an evaluation that is complete was asked."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} is not a folder that `ipissa eval` wrote ({error}).") from error
    missing = {"seed", "adapter", "recipe"} - found.keys() if isinstance(found, dict) else {"seed"}
    if missing:
        raise ConfigError(f"{folder / SETTINGS} is not of `ipissa eval`: it lacks {', '.join(sorted(missing))}.")
    if not (folder / "tables" / "yardsticks.csv").exists():
        raise ConfigError(f"The evaluation in {folder} is not complete; run it again, and it goes on where it was.")
    return found


def _check_same(folders: Sequence[Path], described: Sequence[Mapping[str, Any]]) -> int:
    """How many adapters the evaluations are of."""
    if len(folders) < 2:
        raise ConfigError(f"{len(folders)} evaluations have no median; give folders of at least two seeds.")
    settings = [dict(each) for each in described]
    seeds = [each.pop("seed") for each in settings]
    for each in settings:
        for name in MACHINE:
            each.pop(name, None)
        if each["recipe"] is not None:  # one from before a setting existed has what is its default
            each["recipe"] = TrainConfig("more", "less").to_dict() | each["recipe"]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"The evaluations have the seeds {seeds}; give one folder per seed.")
    adapters = {each["adapter"] for each in settings}
    trained = [each.pop("trained_with_seed", None) for each in settings]
    if len(adapters) > 1 and None not in trained and len(set(trained)) < len(trained):
        raise ConfigError(f"The adapters were trained with the seeds {trained}; use one adapter, or one per seed.")
    if 1 < len(adapters) < len(folders):
        raise ConfigError(f"The {len(folders)} evaluations are of {len(adapters)} adapters; use one, or one per seed.")
    if settings[0]["recipe"] is not None:
        for each in settings:
            del each["adapter"]
    for folder, each in zip(folders, settings, strict=True):
        differing = sorted(key for key in each.keys() | settings[0].keys() if each.get(key) != settings[0].get(key))
        if differing:
            raise ConfigError(
                f"{folder} differs from {folders[0]} in {', '.join(differing)}; "
                f"only seeds, {' and '.join(MACHINE)} may differ."
            )
    return len(adapters)


def _asked(folders: Sequence[Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Which dilemmas, and about what; nothing where there were none, or none of the seeds has an answer."""
    paths = [path for folder in folders if (path := folder / "tables" / "values.csv").exists()]
    if not paths:
        return {}
    target = pd.read_csv(paths[0])["name"].iloc[0]  # it comes first
    first = [pd.read_csv(path.with_name("methods.csv")).get(FIRST_SHOWS) for path in paths]
    known = [float(each.iloc[0]) for each in first if each is not None]
    return {
        "dataset": dataset_name(settings["dataset"]),
        "target": target,
        **({FIRST_SHOWS: known[0]} if known else {}),
    }


def _computed_in(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """In what and on what each seed was evaluated, in words, where that differs."""
    if len({tuple(each.get(name) for name in MACHINE) for each in settings}) == 1:
        return {}
    each = ", ".join(f"{own.get('dtype')} on {own.get('device')} at seed {own['seed']}" for own in settings)
    return {"computed_in": f"Computed in {each}."}


def _chance(folders: Sequence[Path], figures: Sequence[pd.DataFrame], adapters: int) -> dict[str, Any]:
    """How often random adapters do as much, in words and as p; nothing where none were measured."""
    paths = [folder / "tables" / "null.csv" for folder in folders]
    if not any(path.exists() for path in paths):
        return {}
    without = [str(folder) for folder, path in zip(folders, paths, strict=True) if not path.exists()]
    if without:
        return {"chance": f"Of chance nothing is said, as nothing was compared with it in {', '.join(without)}."}
    random = [_of_target(pd.read_csv(path)) for path in paths]
    slopes = [_value(each, ADAPTER, "balanced_value") for each in figures]
    if adapters == 1:
        check = null_check(float(np.median(slopes)), pd.concat(random, ignore_index=True))
        return {"chance": check.sentence(), "chance_p": check.p}
    p = median_p(slopes, random)
    if p is None:
        return {"chance": f"At some seed no random adapter {USABLE}: nothing is said of chance."}
    count = sum(len(comparable(each)) for each in random)
    sentence = (
        f"Take, at each seed, the adapter or one of the random adapters that cost text as much ({count} in all): of "
        f"all such choices {p:.1%} have a median as large (p = {p:.3f})."
    )
    return {"chance": sentence, "chance_p": p}


def _of_target(random: pd.DataFrame) -> pd.DataFrame:
    """The slopes on the target, which comes first.

    Raises:
        ConfigError: the table does not say which are.
    """
    if "name" not in random:
        raise ConfigError("A null.csv is of an earlier version, which kept no values apart; measure that seed again.")
    return random[random["name"] == random["name"].iloc[0]]


def _value(figures: pd.DataFrame, method: str, figure: str) -> float:
    own = figures[(figures["method"] == method) & (figures["figure"] == figure)]
    return float(own["value"].iloc[0])


def _count(of_seeds: pd.Series) -> float:
    return of_seeds.sum(min_count=1)


def _figures(folder: Path) -> pd.DataFrame:
    """method, figure, value of every figure of one evaluation; of `MORE` also whether its interval is above or below 0.

    Raises:
        ConfigError: the tables do not say how far the adapter is above other methods.
    """
    yardsticks = pd.read_csv(folder / "tables" / "yardsticks.csv")
    if MORE not in yardsticks and yardsticks["method"].nunique() > 1:
        raise ConfigError(f"{folder} is of an earlier version, which compared no prompts; measure that seed again.")
    equal = yardsticks[yardsticks["pole"] == "+"].assign(figure="equal")
    parts = [
        equal.assign(value=equal["equal"].astype(float)),
        _worse_pole(yardsticks),
        *_at_poles(yardsticks, FIGURES["yardsticks"]),
    ]
    path = folder / "tables" / "best.csv"
    if path.exists():
        best = pd.read_csv(path)
        parts += _at_poles(best, FIGURES["best"], AT_BEST)
        parts.append(_worse_pole(best).assign(figure=WORSE + AT_BEST))
        one = best[best["pole"] == "+"]
        parts.append(one.assign(figure="degradation at best", value=one["degradation"]))
    path = folder / "tables" / "methods.csv"
    if path.exists():
        methods = pd.read_csv(path)
        parts += [
            methods.assign(figure=name, value=methods[name].astype(float))
            for name in FIGURES["methods"]
            if name in methods
        ]
    columns = ["method", "figure", "value", "above", "below"]
    return pd.concat([part.reindex(columns=columns) for part in parts], ignore_index=True)


def _at_poles(table: pd.DataFrame, names: Sequence[str], suffix: str = "") -> list[pd.DataFrame]:
    """A figure per yardstick and pole, of those that the table has."""
    parts = []
    for name, pole in product((name for name in names if name in table), ("+", "-")):
        own = table[table["pole"] == pole].dropna(subset=[name])
        part = own.assign(figure=f"{name} {pole}{suffix}", value=own[name])
        if name == MORE:
            part = part.assign(above=(own[f"{MORE}_low"] > 0) * 1.0, below=(own[f"{MORE}_high"] < 0) * 1.0)
        parts.append(part)
    return parts


def _worse_pole(yardsticks: pd.DataFrame) -> pd.DataFrame:
    """The trait gain of the pole that has less of it, per method."""
    return (
        yardsticks.groupby("method", sort=False)["trait_gain"].min().rename("value").reset_index().assign(figure=WORSE)
    )


def _markdown(medians: pd.DataFrame, facts: Mapping[str, Any]) -> str:
    """What the seeds are of, and a table per theme, of the methods that have a figure of it."""
    seeds, adapters = facts["seeds"], facts["adapters"]
    of = "of one adapter, whose own training was not repeated" if adapters == 1 else "each of an adapter of its own"
    about = f" Dilemmas: {facts['dataset']}, about {facts['target']!r}." if "target" in facts else ""
    about += "".join(f" {facts[name]}" for name in ("computed_in", "chance") if name in facts)
    few = "" if seeds >= ENOUGH_SEEDS else f" Fewer than {ENOUGH_SEEDS} seeds: claim nothing from them."
    said = f"Medians over {seeds} seeds, {of}, with the lowest and the highest.{about}{few}"
    in_order = pd.Categorical(medians["method"], medians["method"].unique())  # that of the reports
    known = medians.assign(method=in_order)[medians["seeds"] > 0]
    themes = known.groupby(known["figure"].map(_theme), sort=False)
    return "\n\n".join([said, *(f"## {theme}\n\n{_table(found, seeds)}" for theme, found in themes)])


def _theme(figure: str) -> str:
    if figure.endswith(AT_BEST):
        return "On held-out texts, each at its best scale"
    if figure in PUBLISHED:
        return "In dilemmas, as published"
    return "In dilemmas" if figure in FIGURES["methods"] else "On held-out texts"


def _table(medians: pd.DataFrame, seeds: int) -> str:
    """A row per method, a column per figure."""
    cells = [
        f"{row.median:.3g} [{row.lowest:.3g}, {row.highest:.3g}]"
        + (f" ({row.seeds} of {seeds})" if row.seeds < seeds else "")
        for row in medians.itertuples()
    ]
    wide = medians.assign(cell=cells).pivot(index="method", columns="figure", values="cell").fillna("")
    wide = wide[medians["figure"].unique()]
    lines = [f"| method | {' | '.join(wide.columns)} |", "|-" * (1 + len(wide.columns)) + "|"]
    return "\n".join([*lines, *(f"| {method} | {' | '.join(row)} |" for method, row in wide.iterrows())])
