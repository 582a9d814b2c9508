"""Write the README's results from the medians in docs/results, and nothing that is not in them.

ipissa eval --adapter kind-0.safetensors ... --seed 0 --output runs/kind-0     # and seeds 1, 2
ipissa medians runs/kind-0 runs/kind-1 runs/kind-2 --output docs/results/kind
python -m benchmarks.results
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ipissa.evaluate.analysis import MIN_KEPT, SAME_BASE_NATS
from ipissa.evaluate.report.seeds import AT_BEST, FIRST_SHOWS, MORE, WORSE

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
DIGITS = {"trait_gain +": 2, "trait_gain -": 2, "balanced_value": 3, "acquiescence_value": 3}
ONE_SIDED = 0.1  # of the dilemmas at least must list first what shows the target, and what does not
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
        *(f"- {finding}" for finding in _findings(name, medians, facts) if finding),
    ]
    return "\n".join(lines)


def _findings(name: str, medians: pd.DataFrame, facts: Mapping[str, Any]) -> list[str | None]:
    return [
        _at_equal_cost(name, medians),
        _at_best_scale(name, medians),
        _dilemmas(medians, facts),
        facts.get("computed_in"),
    ]


def _row(name: str, method: str, figures: pd.DataFrame, seeds: int) -> str:
    own = figures.set_index("figure")
    cells = [_cell(own.loc[figure], seeds, DIGITS[figure]) if figure in own.index else "" for figure in SHOWN]
    label = f"**{name}**" if method == ADAPTER else method
    if own.loc["equal", "lowest"] != 1:  # NaN for prompts, which have no scale to choose
        label += " (at another cost)"
    if "kept" in own.index and own.loc["kept", "lowest"] < MIN_KEPT:
        label += " (many answers lost)"
    return f"| {label} | {' | '.join(cells)} |"


def _cell(figure: pd.Series, seeds: int, digits: int) -> str:
    """A figure of dilemmas is missing at seeds where the method left too few of them an answer."""
    of = f" ({figure['seeds']} of {seeds})" if figure["seeds"] < seeds else ""
    median, lowest, highest = (f"{figure[name]:.{digits}f}" for name in ("median", "lowest", "highest"))
    return f"{median} [{lowest}, {highest}]{of}"


def _at_equal_cost(name: str, medians: pd.DataFrame) -> str:
    """How far the adapter's trait gain is above that of methods that cost text what it costs at every seed.

    Over the same prompts; seeds are counted. More and less is what has a 95 % interval over prompts on one side of 0.
    """
    at_cost = medians[medians["figure"] == "equal"].set_index("method")["lowest"]  # NaN for prompts: they have no scale
    other = _other_models(medians)
    alike = [method for method in at_cost.index[at_cost == 1] if method not in (ADAPTER, *other)]
    text = (
        "By intervals over prompts, of paired differences, at a cost matched on texts for tuning and over both poles: "
        f"{_apart(name, medians, alike)}"
    )
    if other:
        text += f" Not compared, as at α = 0 it is not the same model: {_listed(other)}."
    unequal = at_cost.index[at_cost == 0]
    if len(unequal):
        text += f" Not compared, as their cost was not equal at every seed: {_listed(unequal)}."
    return text


def _at_best_scale(name: str, medians: pd.DataFrame) -> str | None:
    """The same with each other method at its best scale; None where none has one."""
    worse_at_best = medians[medians["figure"] == WORSE + AT_BEST].set_index("method")["median"]
    best = worse_at_best.drop(_other_models(medians), errors="ignore")
    if best.empty:
        return None
    own = medians[medians["figure"] == WORSE].set_index("method").loc[ADAPTER, "median"]
    nearest = best.idxmax()
    return (
        "With each at the best of nine scales, from 1/64 to 4 times that one, or times the one that it was "
        f"trained at, whatever that costs: {_apart(name, medians, best.index, AT_BEST)} The nearest at its worse pole, "
        f"`{nearest}`, has {best[nearest]:.2f} there, `{name}` {own:.2f}."
    )


def _apart(name: str, medians: pd.DataFrame, methods: Iterable[str], suffix: str = "") -> str:
    """Which methods the adapter is above at both poles and every seed, and what is seen of each other one."""
    more = medians.set_index(["method", "figure"])
    sides = {method: {pole: more.loc[(method, f"{MORE} {pole}{suffix}")] for pole in ("+", "-")} for method in methods}
    clear = [
        method for method, poles in sides.items() if all(side["above"] == side["seeds"] for side in poles.values())
    ]
    sentences = [f"`{name}` has more trait gain than {_listed(clear)} at both poles and every seed."] if clear else []
    sentences += [
        f"Against `{method}`: at + {_counted(poles['+'])}; at - {_counted(poles['-'])}."
        for method, poles in sides.items()
        if method not in clear
    ]
    return " ".join(sentences) or "there is no other method."


def _counted(side: pd.Series) -> str:
    """At how many seeds the interval of a difference is on which side of 0."""
    more, less, seeds = side["above"], side["below"], side["seeds"]
    found = {"more": more, "less": less, "not told apart": seeds - more - less}
    return ", ".join(f"{what} at {count:.0f} of {seeds:.0f} seeds" for what, count in found.items() if count)


def _listed(methods: Iterable[str]) -> str:
    return ", ".join(f"`{each}`" for each in methods)


def _other_models(medians: pd.DataFrame) -> list[str]:
    """Methods whose answers at α = 0 are not the adapter's at some seed, which no table may rank."""
    off = medians[(medians["figure"] == "base_difference") & (medians["highest"] > SAME_BASE_NATS)]
    return off["method"].tolist()


def _dilemmas(medians: pd.DataFrame, facts: Mapping[str, Any]) -> str:
    """Whether choices in dilemmas follow: at every seed one way, and further than chance moves them."""
    slopes = medians[medians["figure"] == "balanced_value"].set_index("method")
    if ADAPTER not in slopes.index:
        return "No dilemmas were asked."
    slope = slopes.loc[ADAPTER]
    of_dilemmas = medians[medians["figure"] == "balanced_p"].set_index("method")
    p = of_dilemmas.loc[ADAPTER]
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
        told, told_p = slopes.loc[PROMPT, "median"], of_dilemmas.loc[PROMPT]
        text += (
            f" Telling the model to be so moves them by {told:.3f}, {_way(told)} what the rule asks (over dilemmas p "
            f"from {told_p['lowest']:.2g} to {told_p['highest']:.2g}; no chance was drawn for it)."
        )
    first = facts.get(FIRST_SHOWS)
    if first is not None and not ONE_SIDED < first < 1 - ONE_SIDED:
        text += (
            f" In {first:.0%} of these dilemmas the action that shows it is listed first, so that its place may pass "
            "for it."
        )
    return text


def _way(slope: float) -> str:
    return "towards" if slope > 0 else "away from"


if __name__ == "__main__":
    main()
