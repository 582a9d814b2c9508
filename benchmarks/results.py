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

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: written by `python -m benchmarks.results` -->", "<!-- end of results -->"
SHOWN = {
    "trait_gain +": "trait gain +",
    "trait_gain -": "trait gain -",
    "balanced_value": "balanced slope",
    "acquiescence_value": "acquiescence",
}
ADAPTER = "adapter"
SURE_T = 2.0


def main() -> None:
    """Replace the README's block."""
    README.write_text(with_results(README.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


def with_results(readme: str, results: Path) -> str:
    """The README with the block between its two marks made from `results`, one section per folder."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    sections = [
        section(path.parent.name, pd.read_csv(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        for path in sorted(results.glob("*/medians.csv"))
    ]
    return "\n\n".join([before + BEGIN, *sections, END]) + after


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
        *(_row(name, method, figures) for method, figures in medians.groupby("method", sort=False)),
        "",
        f"{_rank(name, medians)} {_dilemmas(medians, facts)}",
    ]
    return "\n".join(lines)


def _row(name: str, method: str, figures: pd.DataFrame) -> str:
    own = figures.set_index("figure")
    cells = [
        f"{own.loc[figure, 'median']:.2f} [{own.loc[figure, 'lowest']:.2f}, {own.loc[figure, 'highest']:.2f}]"
        for figure in SHOWN
    ]
    return f"| {f'**{name}**' if method == ADAPTER else method} | {' | '.join(cells)} |"


def _rank(name: str, medians: pd.DataFrame) -> str:
    """The worse pole's trait gain, among methods that cost text what the adapter costs at every seed."""
    equal = medians[(medians["figure"] == "equal") & (medians["lowest"] == 1)]["method"]
    gains = medians[medians["figure"].isin(["trait_gain +", "trait_gain -"])].groupby("method")["median"].min()
    ranked = gains[gains.index.isin(equal)]
    ahead = [f"`{each}`" for each in ranked.index[ranked > ranked[ADAPTER]]]
    text = f"At equal degradation, more trait gain at the worse pole than `{name}`: {_listed(ahead)}."
    best = medians[medians["figure"].isin(["trait_gain + at best", "trait_gain - at best"])]
    if best.empty:
        return text
    at_best = best.groupby("method")["median"].min()
    ahead = [f"`{each}`" for each in at_best.index[at_best > gains[ADAPTER]]]
    nearest = at_best.idxmax()
    return (
        f"{text} Of the methods that are not trained, each at the scale that suits it best, whatever that costs: "
        f"{_listed(ahead)}; the nearest, `{nearest}`, has {at_best[nearest]:.2f} against {gains[ADAPTER]:.2f}."
    )


def _listed(methods: Sequence[str]) -> str:
    return ", ".join(methods) or "no other method"


def _dilemmas(medians: pd.DataFrame, facts: Mapping[str, Any]) -> str:
    """Whether choices in dilemmas follow, at every seed."""
    own = medians[medians["method"] == ADAPTER].set_index("figure")
    slope, t = own.loc["balanced_value"], own.loc["balanced_t"]
    sure = min(abs(t["lowest"]), abs(t["highest"])) >= SURE_T and t["lowest"] * t["highest"] > 0
    says = "is" if sure else "is not"
    return (
        f"Its effect on choices about *{facts['target']}* ({slope['median']:.2f} nats per α, "
        f"t from {t['lowest']:.1f} to {t['highest']:.1f}) {says} distinguishable from nothing at every seed."
    )


if __name__ == "__main__":
    main()
