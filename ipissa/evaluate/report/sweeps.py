"""Tables and figures from the results of `ipissa sweep`: medians with counts, by one setting at a time.

By the rank or the objective for results, by the constraint or the scale mode for ablations, by modules, by
model, by depth, by weight decay: whatever the sweep varied.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ipissa.errors import ConfigError
from ipissa.evaluate.report.seeds import ENOUGH_SEEDS

FIGURES = (
    "trait_gain_positive",
    "trait_gain_negative",
    "plain_gain_positive",
    "plain_gain_negative",
    "symmetry",
    "final_loss",
)


def read_results(path: Path) -> pd.DataFrame:
    """`results.csv` with a column per setting that was varied; runs that failed are left out.

    Raises:
        ConfigError: it is no results file, or holds no run that ended.
    """
    try:
        table = pd.read_csv(path)
        varied = pd.DataFrame([json.loads(each) for each in table["varied"]], index=table.index)
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is not a results.csv of `ipissa sweep` ({error}).") from error
    done = table["error"].isna()
    if not done.any():
        raise ConfigError(f"{path} holds no run that ended.")
    return table.drop(columns=table.columns.intersection(varied.columns)).join(varied.map(_plain))[done]


def table_by(results: pd.DataFrame, setting: str, figures: Sequence[str] = FIGURES) -> pd.DataFrame:
    """Per value of a setting, and of all others that vary: runs, seeds, and the median of every figure.

    Comparisons are controlled: rows differ in `setting` alone within one combination of the others.

    Raises:
        ConfigError: the sweep did not vary the setting.
    """
    varied = sorted({name for each in results["varied"] for name in json.loads(each)})
    if setting not in varied:
        raise ConfigError(f"The sweep did not vary {setting!r}; it varied {', '.join(varied) or 'nothing but seeds'}.")
    keys = [*(name for name in varied if name != setting), setting]
    groups = results.groupby(keys, dropna=False)
    found = groups[list(figures)].median()
    found.insert(0, "runs", groups.size())
    found.insert(1, "seeds", groups["seed"].nunique())
    found.insert(2, "enough_seeds", found["seeds"] >= ENOUGH_SEEDS)
    return found.reset_index()


def figure_by(results: pd.DataFrame, setting: str, figure: str = FIGURES[0]) -> Figure:
    """Every run as a point, and a line of medians over the setting's values for each combination of the others.

    Raises:
        ConfigError: the sweep did not vary the setting.
    """
    medians = table_by(results, setting, (figure,))
    others = list(medians.columns[: medians.columns.get_loc(setting)])
    numeric = pd.api.types.is_numeric_dtype(results[setting]) and results[setting].notna().all()
    names = list(dict.fromkeys(medians[setting].map(_name)))

    def positions(values: pd.Series) -> list[float]:
        return [float(value) if numeric else float(names.index(_name(value))) for value in values]

    drawn = Figure(figsize=(7, 4), layout="constrained")
    axis = drawn.subplots()
    axis.scatter(positions(results[setting]), results[figure], s=18, color="lightgrey", label="runs")
    for combination, own in medians.groupby(others, dropna=False) if others else [((), medians)]:
        pairs = zip(others, combination, strict=True)
        label = ", ".join(f"{name} {_name(value)}" for name, value in pairs) or "median"
        axis.plot(positions(own[setting]), own[figure], marker="o", label=label)
    if not numeric:
        axis.set_xticks(np.arange(len(names)), names)
    axis.set_xlabel(setting)
    axis.set_ylabel(figure.replace("_", " "))
    axis.legend(fontsize="small")
    return drawn


def _name(value: object) -> str:
    return "none" if pd.isna(value) else str(value)


def _plain(value: object) -> object:
    """Lists and objects as text, so that rows can be grouped by them."""
    return json.dumps(value) if isinstance(value, list | dict) else value
