"""Write the README's results from the medians in docs/results, and nothing that is not in them.

ipissa eval --adapter kind-0.safetensors ... --seed 0 --output runs/kind-0     # and seeds 1, 2
ipissa medians runs/kind-0 runs/kind-1 runs/kind-2 --output docs/results/kind
python -m benchmarks.results
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ipissa.evaluate.analysis import SAME_BASE_NATS

from .written import with_block

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
README = ROOT / "README.md"
SHOWN = {
    "trait_gain +": "trait gain +",
    "trait_gain -": "trait gain -",
    "balanced_value": "balanced slope",
    "acquiescence_value": "acquiescence",
}
ADAPTER, PROMPT = "adapter", "prompt"
SURE_P = 0.05


def main() -> None:
    """Replace the README's block."""
    README.write_text(with_results(README.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


def with_results(readme: str, results: Path) -> str:
    """The README with a section per folder of `results` between its marks."""
    sections = [
        section(path.parent.name, pd.read_csv(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        for path in sorted(results.glob("*/medians.csv"))
    ]
    return with_block(readme, "results", sections, name=README.name)


def section(name: str, medians: pd.DataFrame, facts: Mapping[str, Any]) -> str:
    """A table of all methods and what follows from it for the adapter.

    Args:
        facts: `medians.json`: how many seeds and adapters, and which dilemmas.
    """
    of = "one adapter" if facts["adapters"] == 1 else f"{facts['adapters']} adapters, one per seed"
    lines = [
        f"**`{name}`**, medians over {facts['seeds']} seeds of {of}, with the lowest and the highest:",
        "",
        f"| method | {' | '.join(SHOWN.values())} |",
        "|-" * (1 + len(SHOWN)) + "|",
        *(_row(name, method, figures, facts["seeds"]) for method, figures in medians.groupby("method", sort=False)),
        "",
        " ".join(filter(None, [_rank(name, medians), _dilemmas(medians, facts), facts.get("computed_in")])),
    ]
    return "\n".join(lines)


def _row(name: str, method: str, figures: pd.DataFrame, seeds: int) -> str:
    own = figures.set_index("figure")
    cells = [_cell(own.loc[figure], seeds) if figure in own.index else "" for figure in SHOWN]
    label = f"**{name}**" if method == ADAPTER else method
    if own.loc["equal", "lowest"] != 1:  # NaN for prompts, which have no scale to choose
        label += " (at another cost)"
    return f"| {label} | {' | '.join(cells)} |"


def _cell(figure: pd.Series, seeds: int) -> str:
    """A figure of dilemmas is missing at seeds where the method left too few of them an answer."""
    of = f" ({figure['seeds']} of {seeds})" if figure["seeds"] < seeds else ""
    return f"{figure['median']:.2f} [{figure['lowest']:.2f}, {figure['highest']:.2f}]{of}"


def _rank(name: str, medians: pd.DataFrame) -> str:
    """The worse pole's trait gain, among methods that cost text what the adapter costs at every seed."""
    at_cost = medians[medians["figure"] == "equal"].set_index("method")["lowest"]  # NaN for prompts: they have no scale
    other = _other_models(medians)
    gains = medians[medians["figure"] == "trait_gain worse"].set_index("method")
    compared = gains.index.isin(at_cost.index[at_cost == 1]) & ~gains.index.isin(other)
    text = (
        f"At a cost matched on texts for tuning, over both poles, more trait gain at the worse pole than `{name}`: "
        f"{_ahead(gains[compared])}."
    )
    if other:
        text += f" Not compared, as at α = 0 it is not the same model: {', '.join(f'`{each}`' for each in other)}."
    unequal = [f"`{each}`" for each in at_cost.index[at_cost == 0]]
    if unequal:
        text += f" Not compared, as their cost was not equal at every seed: {', '.join(unequal)}."
    best = medians[medians["figure"] == "trait_gain worse at best"].set_index("method").drop(other, errors="ignore")
    if best.empty:
        return text
    nearest = best["median"].idxmax()
    return (
        f"{text} With each at the best of the scales from 1/64 to 4 times that one, or times the one that it was "
        f"trained at, whatever that costs: {_ahead(best)}; the nearest, `{nearest}`, has "
        f"{best.loc[nearest, 'median']:.2f} against {gains.loc[ADAPTER, 'median']:.2f}."
    )


def _other_models(medians: pd.DataFrame) -> list[str]:
    """Methods whose answers at α = 0 are not the adapter's at some seed, which no table may rank."""
    off = medians[(medians["figure"] == "base_difference") & (medians["highest"] > SAME_BASE_NATS)]
    return off["method"].tolist()


def _ahead(gains: pd.DataFrame) -> str:
    """The methods above the adapter at every seed, and those that are at some: a median alone decides nothing."""
    every = [f"`{each}`" for each in gains.index[gains["ahead"] == gains["seeds"]]]
    some = [f"`{each}`" for each in gains.index[gains["ahead"].between(1, gains["seeds"] - 1)]]
    text = ", ".join(every) or "no other method"
    return f"{text} at every seed, {', '.join(some)} at some" if some else text


def _dilemmas(medians: pd.DataFrame, facts: Mapping[str, Any]) -> str:
    """Whether choices in dilemmas follow: at every seed one way, and further than chance moves them."""
    slopes = medians[medians["figure"] == "balanced_value"].set_index("method")
    if ADAPTER not in slopes.index:
        return "No dilemmas were asked."
    slope = slopes.loc[ADAPTER]
    p = medians[medians["figure"] == "balanced_p"].set_index("method").loc[ADAPTER]
    everywhere = slope["seeds"] == facts["seeds"] and p["highest"] < SURE_P and slope["lowest"] * slope["highest"] > 0
    sure = everywhere and facts.get("chance_p", 1) < SURE_P  # without random adapters there is nothing to tell it from
    text = (
        f"Its effect on choices about *{facts['target']}* ({slope['median']:.3f} nats per α, {_way(slope['median'])} "
        f"what the rule asks; over dilemmas p from {p['lowest']:.2g} to {p['highest']:.2g}) "
        f"{'is' if sure else 'is not'} told from nothing."
    )
    if "chance" in facts:
        text += f" {facts['chance']}"
    if PROMPT in slopes.index:
        told = slopes.loc[PROMPT, "median"]
        text += f" Telling the model to be so moves them by {told:.3f}, {_way(told)} what the rule asks."
    return text


def _way(slope: float) -> str:
    return "towards" if slope > 0 else "away from"


if __name__ == "__main__":
    main()
