"""One evaluation over several seeds: medians with their range and count, as only they are worth quoting.

A seed redraws texts, and makes random and trained methods anew. That says how much an adapter depends on its own seed
only where every evaluation has an adapter of its own, trained by one recipe with other seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ipissa.errors import ConfigError
from ipissa.evaluate.methods import ADAPTER
from ipissa.evaluate.null import null_check
from ipissa.evaluate.report.parts import SETTINGS
from ipissa.files import write_text

ENOUGH_SEEDS = 3
FIGURES = {
    "yardsticks": ("trait_gain", "plain_gain", "contrast"),
    "methods": (
        "balanced_value", "balanced_t", "balanced_p", "acquiescence_value", "published_effect", "published_gain",
        "steering_f1", "transfer", "symmetry", "dose_monotonic",
    ),
}  # fmt: skip


def summarise_seeds(folders: Sequence[Path], output: Path) -> str:
    """Write `medians.csv`, `medians.json` and `medians.md` to `output`; returns the Markdown.

    Args:
        folders: Of `ipissa eval`, with the same settings but for the seed, of one adapter or of one recipe.

    Raises:
        ConfigError: one is no evaluation, or they differ in more than the seed.
    """
    facts = {"seeds": len(folders), "adapters": _check_same(folders), **_asked(folders[0])}
    long = pd.concat([_figures(folder) for folder in folders], ignore_index=True)
    medians = (
        long.groupby(["method", "figure"], sort=False)["value"]
        .agg(median="median", lowest="min", highest="max", seeds="count")
        .reset_index()
    )
    random = [pd.read_csv(path) for folder in folders if (path := folder / "tables" / "null.csv").exists()]
    if random:
        own = medians[(medians["method"] == ADAPTER) & (medians["figure"] == "balanced_value")]
        check = null_check(float(own["median"].iloc[0]), pd.concat(random, ignore_index=True))
        facts["chance"] = check.sentence()
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "medians.csv", medians.to_csv(index=False))
    write_text(output / "medians.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    text = _markdown(medians, facts)
    write_text(output / "medians.md", text + "\n")
    return text


def _check_same(folders: Sequence[Path]) -> int:
    """How many adapters the evaluations are of."""
    if len(folders) < 2:
        raise ConfigError(f"{len(folders)} evaluations have no median; give folders of at least two seeds.")
    settings = []
    for folder in folders:
        try:
            settings.append(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} is not a folder that `ipissa eval` wrote ({error}).") from error
    seeds = [each.pop("seed") for each in settings]
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
            raise ConfigError(f"{folder} differs from {folders[0]} in {', '.join(differing)}; only seeds may differ.")
    return len(adapters)


def _asked(folder: Path) -> dict[str, Any]:
    """Which dilemmas, and about what; nothing where there were none."""
    path = folder / "choices.json"
    if not path.exists():
        return {}
    choices = json.loads(path.read_text(encoding="utf-8"))
    return {"dataset": choices["dataset"], "target": choices["target"]}


def _figures(folder: Path) -> pd.DataFrame:
    """method, figure, value of every figure of one evaluation."""
    yardsticks = pd.read_csv(folder / "tables" / "yardsticks.csv")
    equal = yardsticks[yardsticks["pole"] == "+"].assign(figure="equal")
    parts = [equal.assign(value=equal["equal"].astype(float))]
    parts += [
        yardsticks.assign(figure=f"{name} {pole}", value=yardsticks[name])[yardsticks["pole"] == pole]
        for name in FIGURES["yardsticks"]
        for pole in ("+", "-")
    ]
    path = folder / "tables" / "best.csv"
    if path.exists():
        best = pd.read_csv(path)
        parts += [
            best.assign(figure=f"trait_gain {pole} at best", value=best["trait_gain"])[best["pole"] == pole]
            for pole in ("+", "-")
        ]
        one = best[best["pole"] == "+"]
        parts.append(one.assign(figure="degradation at best", value=one["degradation"]))
    path = folder / "tables" / "methods.csv"
    if path.exists():
        methods = pd.read_csv(path)
        parts += [methods.assign(figure=name, value=methods[name]) for name in FIGURES["methods"]]
    return pd.concat([part[["method", "figure", "value"]] for part in parts], ignore_index=True)


def _markdown(medians: pd.DataFrame, facts: Mapping[str, Any]) -> str:
    seeds, adapters = facts["seeds"], facts["adapters"]
    of = "of one adapter, whose own training was not repeated" if adapters == 1 else "each of an adapter of its own"
    about = f" Dilemmas: {facts['dataset']}, about {facts['target']!r}." if "target" in facts else ""
    if "chance" in facts:
        about += f" {facts['chance']}"
    few = "" if seeds >= ENOUGH_SEEDS else f" Fewer than {ENOUGH_SEEDS} seeds: claim nothing from them."
    figures = list(dict.fromkeys(medians["figure"]))
    cell = {
        (row.method, row.figure): f"{row.median:.3g} [{row.lowest:.3g}, {row.highest:.3g}]"
        + (f" ({row.seeds} of {seeds})" if row.seeds < seeds else "")
        for row in medians.itertuples()
        if row.seeds
    }
    lines = [
        f"Medians over {seeds} seeds, {of}, with the lowest and the highest.{about}{few}",
        "",
        f"| method | {' | '.join(figures)} |",
        "|-" * (len(figures) + 1) + "|",
    ]
    for method in dict.fromkeys(medians["method"]):
        lines.append(f"| {method} | {' | '.join(cell.get((method, figure), '') for figure in figures)} |")
    return "\n".join(lines)
