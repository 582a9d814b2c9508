"""Write the README's results from the medians in docs/results, and nothing that is not in them.

ipissa eval --adapter kind-0.safetensors ... --seed 0 --output runs/kind-0     # and seeds 1, 2
ipissa medians runs/kind-0 runs/kind-1 runs/kind-2 --output docs/results/kind
python -m benchmarks.results
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

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
ADAPTER = "adapter"
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
        f"{_rank(name, medians)} {_dilemmas(medians, facts)}",
    ]
    return "\n".join(lines)


def _row(name: str, method: str, figures: pd.DataFrame, seeds: int) -> str:
    own = figures.set_index("figure")
    cells = [_cell(own.loc[figure], seeds) if figure in own.index else "" for figure in SHOWN]
    label = f"**{name}**" if method == ADAPTER else method
    if own.loc["equal", "lowest"] == 0:
        label += " (at another cost)"
    return f"| {label} | {' | '.join(cells)} |"


def _cell(figure: pd.Series, seeds: int) -> str:
    """A figure of dilemmas is missing at seeds where the method left too few of them an answer."""
    of = f" ({figure['seeds']} of {seeds})" if figure["seeds"] < seeds else ""
    return f"{figure['median']:.2f} [{figure['lowest']:.2f}, {figure['highest']:.2f}]{of}"


def _rank(name: str, medians: pd.DataFrame) -> str:
    """The worse pole's trait gain, among methods that cost text what the adapter costs at every seed."""
    at_cost = medians[medians["figure"] == "equal"].set_index("method")["lowest"]  # NaN for prompts: they have no scale
    equal = at_cost.index[at_cost == 1]
    gains = medians[medians["figure"].isin(["trait_gain +", "trait_gain -"])].groupby("method")["median"].min()
    ranked = gains[gains.index.isin(equal)]
    ahead = [f"`{each}`" for each in ranked.index[ranked > ranked[ADAPTER]]]
    text = f"At equal degradation, more trait gain at the worse pole than `{name}`: {_listed(ahead)}."
    unequal = [f"`{each}`" for each in at_cost.index[at_cost == 0]]
    if unequal:
        text += f" Not compared, as their cost was not equal at every seed: {_listed(unequal)}."
    best = medians[medians["figure"].isin(["trait_gain + at best", "trait_gain - at best"])]
    if best.empty:
        return text
    at_best = best.groupby("method")["median"].min()
    ahead = [f"`{each}`" for each in at_best.index[at_best > gains[ADAPTER]]]
    nearest = at_best.idxmax()
    gain = at_best[nearest]
    return (
        f"{text} With each at the best of the scales from 1/64 to 4 times that one, or times the one that it was "
        f"trained at, whatever that costs: {_listed(ahead)}; the nearest, `{nearest}`, has {gain:.2f} against "
        f"{gains[ADAPTER]:.2f}."
    )


def _listed(methods: Sequence[str]) -> str:
    return ", ".join(methods) or "no other method"


def _dilemmas(medians: pd.DataFrame, facts: Mapping[str, Any]) -> str:
    """Whether choices in dilemmas follow: at every seed, the right way, and further than chance moves them."""
    own = medians[medians["method"] == ADAPTER].set_index("figure")
    slope, p = own.loc["balanced_value"], own.loc["balanced_p"]
    sure = p["highest"] < SURE_P and slope["lowest"] * slope["highest"] > 0
    says = "is" if sure else "is not"
    way = "towards" if slope["median"] > 0 else "away from"
    text = (
        f"Its effect on choices about *{facts['target']}* ({slope['median']:.3f} nats per α, {way} what the rule asks; "
        f"p from {p['lowest']:.2g} to {p['highest']:.2g}) {says} at every seed distinguishable from nothing."
    )
    return f"{text} {facts['chance']}" if "chance" in facts else text


if __name__ == "__main__":
    main()
