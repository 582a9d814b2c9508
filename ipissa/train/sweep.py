"""Many runs over a grid of settings: one CSV row each, resumable, summed up over seeds.

A grid file has the settings all runs share and the lists to combine:

    base: {positive: kind, negative: angry, model: smollm2-135m}
    grid: {lr: [0.001, 0.003], seed: [0, 1, 2]}

or several grids, one after the other, where some combinations are of no use:

    grid:
      - {objective: [guided, odd], seed: [0, 1, 2]}
      - {objective: [antiparallel], depth_end: [0.5], seed: [0, 1, 2]}

One seed proves nothing: identical settings differ from seed to seed by more than most choices matter.
The summary therefore gives medians with their counts, marks what rests on fewer than three seeds, and
compares the trait gain of the worse pole, by Welch's t-test over seeds, with the first combination on the same
model that differs in one setting only, and says which that is.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import ttest_ind

from ipissa.errors import ConfigError, IpissaError
from ipissa.evaluate.yardsticks import ResponsePoint, response_symmetry
from ipissa.files import write_table
from ipissa.models import dtype_name, resolve_device
from ipissa.train.answers import digest
from ipissa.train.config import TrainConfig, read_settings
from ipissa.train.processes import refuse_launcher
from ipissa.train.result import TrainResult

logger = logging.getLogger(__name__)
ENOUGH_SEEDS = 3
FIGURES = tuple(
    f"{figure}_{pole}" for figure in ("trait_gain", "plain_gain", "contrast") for pole in ("positive", "negative")
)
COLUMNS = (
    "run", "varied", "seed", "dtype", *FIGURES, "worse_gain", "symmetry", "low", "high", "final_loss", "seconds",
    "error",
)  # fmt: skip
Row = dict[str, str]
Train = Callable[..., TrainResult]


def read_grid(path: Path) -> list[TrainConfig]:
    """The configs of a grid file, in the order of their combinations.

    Raises:
        ConfigError: the file is not of that form, or a combination is unusable.
    """
    values = read_settings(path)
    base, grid = values.get("base"), values.get("grid")
    grids: list[Any] = grid if isinstance(grid, list) and grid else [grid]
    if not isinstance(base, dict) or not all(isinstance(each, dict) for each in grids) or len(values) != 2:
        raise ConfigError(f"The grid {path} needs base, a mapping, and grid, a mapping or a list of them, and no more.")
    for name, options in (pair for each in grids for pair in each.items()):
        if not isinstance(options, list) or not options:
            raise ConfigError(f"grid setting {name!r} is {options!r}; give a list of values.")
    return [
        TrainConfig.from_dict(base | dict(zip(each, chosen, strict=True)))
        for each in grids
        for chosen in itertools.product(*each.values())
    ]


def run_sweep(configs: Sequence[TrainConfig], folder: Path, train: Train) -> Path:
    """Train every config that has no row without an error yet; returns the CSV.

    A run that ends with an error gets a row that says so, and the sweep goes on; begun again, it is tried again. A run
    that was broken off is resumed.

    Args:
        folder: Gets `results.csv`, `summary.csv` and an adapter per run; and `shared`, the texts and teachers of runs
            that ask the base model the same, which may be removed afterwards.
        train: `ipissa.train.train`.

    Raises:
        ConfigError: the folder holds runs of another grid, or in another arithmetic.
    """
    refuse_launcher("A sweep")
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.csv"
    # A combination may be in two grids, and counts once.
    named = {digest(config.to_dict() | config.contents()): config for config in configs}
    done = {row["run"]: row for row in _read(results)}
    if foreign := done.keys() - named.keys():
        raise ConfigError(
            f"{results} holds {len(foreign)} runs that this grid does not have (other settings, other prompts, or an "
            "earlier version), so medians would be mixed; choose another --output, or put settings and prompts back."
        )
    for name, row in done.items():
        if row["error"]:
            continue
        there, here = row.get("dtype", "a dtype that it does not say"), _dtype(named[name])
        if there != here:
            raise ConfigError(
                f"{results} holds runs in {there}, and here they would be in {here}, so medians would be mixed; choose "
                "another --output."
            )
    settings = {name: config.to_dict() for name, config in named.items()}
    varied = [key for key in _varied(list(settings.values())) if key != "seed"]
    for name, config in named.items():
        if name not in done or done[name]["error"]:
            done[name] = _run(config, name, folder, train)
        # A grid that has grown varies more than the rows of before say.
        rows = [
            done[each] | {"varied": json.dumps({key: own[key] for key in varied}, ensure_ascii=False)}
            for each, own in settings.items()
            if each in done
        ]
        write_table(results, COLUMNS, rows)
        write_table(folder / "summary.csv", _SUMMARY, summary(rows))
    return results


_SUMMARY = (
    "varied",
    "runs",
    "failed",
    "enough_seeds",
    *FIGURES,
    "symmetry",
    "worse_gain_mean",
    "worse_gain_sd",
    "against",
    "t",
    "p",
)


def summary(rows: Sequence[Row]) -> list[Row]:
    """Medians over seeds for every combination of the other settings that vary."""
    found = []
    gains: dict[str, list[float]] = {}  # of the worse pole, by combination
    for varied in dict.fromkeys(row["varied"] for row in rows):
        group = [row for row in rows if row["varied"] == varied]
        done = [row for row in group if not row["error"]]
        gains[varied] = [float(row["worse_gain"]) for row in done]
        seeds = {row["seed"] for row in done}
        found.append(
            {
                "varied": varied,
                "runs": str(len(group)),
                "failed": str(len(group) - len(done)),
                "enough_seeds": "yes" if len(seeds) >= ENOUGH_SEEDS else "no",
                **{
                    figure: f"{statistics.median(float(row[figure]) for row in done):.4f}" if done else ""
                    for figure in (*FIGURES, "symmetry")
                },
                **_over_seeds(gains, varied),
            }
        )
    return found


def _over_seeds(gains: Mapping[str, Sequence[float]], varied: str) -> Row:
    """Mean and deviation of the worse pole's gain over seeds, and its difference from a combination before."""
    own = gains[varied]
    found = {}
    if own:
        found["worse_gain_mean"] = f"{statistics.mean(own):.4f}"
    if len(own) > 1:
        found["worse_gain_sd"] = f"{statistics.stdev(own):.4f}"
        matched = (other for other in gains if len(gains[other]) > 1 and _differs_in_one(other, varied))
        reference = next(matched, None)
        if reference is not None:
            test = ttest_ind(own, gains[reference], equal_var=False)
            found |= {"against": reference, "t": f"{test.statistic:.2f}", "p": f"{test.pvalue:.3g}"}
    return found


def _differs_in_one(one: str, other: str) -> bool:
    """Whether two combinations, on one model, differ in a single setting."""
    mine, its = json.loads(one), json.loads(other)
    differing = [name for name in mine if mine[name] != its[name]]
    return len(differing) == 1 and differing != ["model"]


def _run(config: TrainConfig, name: str, folder: Path, train: Train) -> Row:
    row = dict.fromkeys(COLUMNS, "") | {"run": name, "seed": str(config.seed)}
    try:
        row["dtype"] = _dtype(config)
        result = train(config, folder / f"{name}.safetensors", resume=True, shared=folder / "shared")
    except IpissaError as error:  # this run's settings do not work; others may
        return row | {"error": str(error)}
    except Exception as error:  # of the libraries below, such as no memory left: it costs this run only
        logger.exception("A run failed: %s", row)
        return row | {"error": f"{type(error).__name__}: {error}"}
    return row | {key: str(value) for key, value in _figures(result).items()}


def _dtype(config: TrainConfig) -> str:
    return dtype_name(config.dtype, resolve_device(config.device))


def _figures(result: TrainResult) -> Mapping[str, float]:
    yardsticks = result.yardsticks.to_dict()
    figures = {
        f"{figure}_{pole}": yardsticks[pole][figure]["value"]
        for figure in ("trait_gain", "plain_gain", "contrast")
        for pole in ("positive", "negative")
    }
    low, high = result.adapter.alpha_range
    said = result.adapter.evaluation
    return figures | {
        "worse_gain": min(figures["trait_gain_positive"], figures["trait_gain_negative"]),
        "symmetry": response_symmetry([ResponsePoint(**point) for point in said["response"]]),
        "low": low,
        "high": high,
        "final_loss": said["training"]["final_loss"],
        "seconds": round(result.seconds),
    }


def _varied(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in settings[0] if len({json.dumps(each[name]) for each in settings}) > 1]


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
