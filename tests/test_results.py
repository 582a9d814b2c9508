"""What the documents say was measured is what the tables in docs/results say."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.objectives import DOCUMENT, SWEEPS, table, with_objectives
from benchmarks.results import README as DOCUMENT_OF_RESULTS
from benchmarks.results import RESULTS, SHOWN, section, with_results
from benchmarks.written import marks

FACTS = {"seeds": 3, "adapters": 3, "dataset": "dilemmas.csv", "target": "candour", "chance_p": 0.01}
BEGIN, END = marks("results")
README = f"# ipissa\n\n{BEGIN}\n\nof last year\n\n{END}\n\nRead on."
SURE = (0.001, 0.01, 0.04)
COLUMNS = ["method", "figure", "median", "lowest", "highest", "seeds", "above", "below"]


def medians(p: tuple[float, float, float], **worse_gains: float) -> pd.DataFrame:
    """Methods with a trait gain of 0.5 at + and another at -, and a p of some slope at three seeds.

    Differences of 0.2 and more have an interval on one side of 0 at every seed.
    """
    rows = []
    for method, gain in worse_gains.items():
        equal = {"prompt": None, "dora": 0}.get(method, 1)  # lowest of the seeds
        rows.append(figure(method, "equal", equal))
        for name in (*SHOWN, "trait_gain worse", "balanced_p"):
            low, median, high = p if name == "balanced_p" else (gain - 0.1, gain, gain + 0.1)
            if name == "trait_gain +":
                low, median, high = 0.4, 0.5, 0.6
            rows.append(figure(method, name, median, low, high))
        if method != "adapter":
            rows += [more(method, pole, worse_gains["adapter"] - gain) for pole in "+-"]
    return pd.DataFrame(rows, columns=COLUMNS)


def figure(method: str, name: str, median: float | None, low: float | None = None, high: float | None = None) -> list:
    """A row of medians over three seeds."""
    return [method, name, median, median if low is None else low, median if high is None else high, 3, None, None]


def more(method: str, pole: str, apart: float, suffix: str = "") -> list:
    return [*figure(method, f"adapter_more {pole}{suffix}", apart)[:-2], 3 * (apart > 0.15), 3 * (apart < -0.15)]


def at_best(**gains: float) -> pd.DataFrame:
    """Methods at their best scale beside an adapter of 0.3."""
    rows = [
        row
        for method, gain in gains.items()
        for row in (
            figure(method, "trait_gain worse at best", gain),
            *(more(method, pole, 0.3 - gain, " at best") for pole in "+-"),
        )
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_every_method_has_a_row_and_is_compared_at_the_same_cost() -> None:
    text = section("kind", medians(SURE, adapter=0.3, prompt=1.0, caa=0.1, lora=0.35, dora=0.4, reft=0.6), FACTS)
    assert "| **kind** | 0.50 [0.40, 0.60] | 0.30 [0.20, 0.40] | 0.300 [0.200, 0.400] |" in text
    assert "| caa | 0.50 [0.40, 0.60] | 0.10 [0.00, 0.20] |" in text
    assert "`kind` has more trait gain than `caa` at both poles and every seed." in text
    assert "Against `lora`: at + not told apart at 3 of 3 seeds; at - not told apart at 3 of 3 seeds." in text
    assert "Against `reft`: at + less at 3 of 3 seeds; at - less at 3 of 3 seeds." in text
    # Prompts have no scale, and dora's did not match.
    assert "Not compared, as their cost was not equal at every seed: `dora`." in text
    assert "Against `dora`" not in text
    assert "Against `prompt`" not in text
    assert "| dora (at another cost) |" in text
    assert "| prompt (at another cost) |" in text
    assert "medians over 3 seeds of 3 adapters, one per seed" in text
    first = section("kind", medians(SURE, adapter=0.3), FACTS | {"adapters": 1})
    assert "medians over 3 seeds of one adapter" in first
    assert "over both poles: there is no other method." in first


def test_seeds_that_say_otherwise_are_counted() -> None:
    table = medians(SURE, adapter=0.3, lora=0.1)
    at_plus = table["figure"] == "adapter_more +"
    table.loc[at_plus, ["above", "below"]] = [1, 1]
    said = (
        "Against `lora`: at + more at 1 of 3 seeds, less at 1 of 3 seeds, not told apart at 1 of 3 seeds; at - more at"
    )
    assert said in section("kind", table, FACTS)


def test_a_method_that_is_another_model_at_zero_is_compared_with_nothing() -> None:
    table = medians(SURE, adapter=0.3, caa=0.4, lora=0.1)
    off = [figure(method, "base_difference", 0.0, 0.0, nats) for method, nats in (("caa", 0.6), ("lora", 0.09))]
    text = section("kind", pd.concat([table, pd.DataFrame(off, columns=COLUMNS), at_best(caa=0.5, lora=0.1)]), FACTS)
    assert (
        "`kind` has more trait gain than `lora` at both poles and every seed. Not compared, as at α = 0 it is" in text
    )
    assert "it is not the same model: `caa`.\n- With each" in text
    assert "The nearest at its worse pole, `lora`, has 0.10 there, `kind` 0.30." in text


def test_methods_at_their_own_best_scale_are_compared_once_more() -> None:
    table = pd.concat([medians(SURE, adapter=0.3, caa=0.1, sspace=0.1), at_best(caa=0.05, sspace=0.31)])
    text = section("kind", table, FACTS)
    assert (
        "whatever that costs: `kind` has more trait gain than `caa` at both poles and every seed. Against `sspace`: "
        "at + not told apart at 3 of 3 seeds; at - not told apart at 3 of 3 seeds. The nearest at its worse pole, "
        "`sspace`, has 0.31 there, `kind` 0.30."
    ) in text


@pytest.mark.parametrize(
    ("p", "slope", "way", "says"),
    [
        (SURE, 0.3, "towards", "is told"),
        (SURE, -0.3, "away from", "is told"),
        ((0.001, 0.01, 0.06), 0.3, "towards", "is not told"),
        (SURE, 0.05, "towards", "is not told"),
    ],
)
def test_an_effect_on_choices_is_claimed_only_if_every_seed_has_it(
    p: tuple[float, float, float], slope: float, way: str, says: str
) -> None:
    text = section("kind", medians(p, adapter=slope), FACTS)
    found = f"{slope:.3f} nats per α, {way} what the rule asks; over dilemmas p from {p[0]:.2g} to {p[2]:.2g}"
    assert f"choices about *candour* ({found}) {says} from nothing." in text


def test_without_random_adapters_or_with_a_seed_that_lost_its_answers_no_effect_is_claimed() -> None:
    found = medians(SURE, adapter=0.3)
    assert "is told from nothing" in section("kind", found, FACTS)
    assert "is not told from nothing" in section("kind", found, {k: v for k, v in FACTS.items() if k != "chance_p"})
    found.loc[found["figure"] == "balanced_value", "seeds"] = 2
    assert "is not told from nothing" in section("kind", found, FACTS)


def test_what_chance_does_is_said_beside_the_effect_on_choices() -> None:
    chance = {"chance": "Of 9 random adapters, none moves more.", "chance_p": 0.1}
    text = section("kind", medians(SURE, adapter=0.3), FACTS | chance)
    assert text.endswith("is not told from nothing. Of 9 random adapters, none moves more.")  # whatever p over dilemmas
    text = section("kind", medians(SURE, adapter=0.3, prompt=-0.2), FACTS | chance | {"chance_p": 0.01})
    assert "is told from nothing." in text
    told = "moves them by -0.200, away from what the rule asks (over dilemmas p from 0.001 to 0.04; no chance was drawn"
    assert told in text
    assert "is listed first" not in section("kind", medians(SURE, adapter=0.3), FACTS | {"first_shows": 0.5})
    text = section("kind", medians(SURE, adapter=0.3), FACTS | {"first_shows": 0.97})
    assert text.endswith(
        "In 97% of these dilemmas the action that shows it is listed first, so that its place may pass for it."
    )


def test_without_dilemmas_there_is_a_sentence() -> None:
    table = medians(SURE, adapter=0.3)
    assert section("kind", table[~table["figure"].str.startswith("balanced")], FACTS).endswith(
        "No dilemmas were asked."
    )


def test_a_method_that_leaves_dilemmas_no_answer_has_empty_cells() -> None:
    table = medians(SURE, adapter=0.3, caa=0.1)
    lost = (table["method"] == "caa") & table["figure"].isin(["balanced_value", "acquiescence_value"])
    assert "| caa | 0.50 [0.40, 0.60] | 0.10 [0.00, 0.20] |  |  |" in section("kind", table[~lost], FACTS)
    table.loc[lost, "seeds"] = 2
    assert "| 0.100 [0.000, 0.200] (2 of 3) | 0.100 [0.000, 0.200] (2 of 3) |" in section("kind", table, FACTS)


def test_the_readme_keeps_everything_but_its_results(tmp_path: Path) -> None:
    (tmp_path / "kind").mkdir()
    medians(SURE, adapter=0.3).to_csv(tmp_path / "kind" / "medians.csv", index=False)
    (tmp_path / "kind" / "medians.json").write_text(json.dumps(FACTS))
    text = with_results(README, tmp_path)
    assert text.startswith("# ipissa\n")
    assert text.endswith("\n\nRead on.")
    assert "of last year" not in text
    assert "**`kind`**" in text
    assert with_results(text, tmp_path) == text
    with pytest.raises(SystemExit, match="has no place for the results"):
        with_results("# ipissa", tmp_path)


def sweep_rows(objective: str, gains: tuple[str, ...], error: str = "") -> list[dict[str, str]]:
    """A run per seed as `ipissa sweep` records it, with this trait gain at + and half of it at -."""
    return [
        {
            "varied": json.dumps({"objective": objective}),
            "seed": str(seed),
            "trait_gain_positive": gain,
            "trait_gain_negative": gain and f"{float(gain) / 2}",
            "symmetry": gain and "0.75",
            "low": gain and "-1.5",
            "high": gain and "2.0",
            "error": "" if gain else error,
        }
        for seed, gain in enumerate(gains)
    ]


def test_the_results_in_the_readme_are_those_of_the_medians() -> None:
    readme = DOCUMENT_OF_RESULTS.read_text(encoding="utf-8")
    assert with_results(readme, RESULTS) == readme
    assert readme.count("medians over") == len(list(RESULTS.glob("*/medians.csv")))


def test_the_table_of_objectives_in_the_document_is_that_of_the_sweeps() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert with_objectives(document, SWEEPS) == document
    assert document.count("| `guided` |") == len(list(SWEEPS.glob("*.csv"))) > 0


def test_objectives_are_medians_over_the_seeds_that_ended(tmp_path: Path) -> None:
    rows = sweep_rows("guided", ("0.6", "0.2", "0.4")) + sweep_rows("told", ("0.1", "", "0.3"), "no memory")
    pd.DataFrame(rows).to_csv(tmp_path / "tiny.csv", index=False)
    text = table(tmp_path / "tiny.csv")
    assert text.startswith("**tiny**")
    assert "| `guided` | default | 0.40 [0.20, 0.60] | 0.20 [0.10, 0.30] | 0.75 [0.75, 0.75] | -1.5 to 2 | 3 |" in text
    pd.DataFrame(rows + sweep_rows("odd", ("", ""), "no memory")).to_csv(tmp_path / "failed.csv", index=False)
    assert "| `odd` | default | | | | | 0, 2 failed |" in table(tmp_path / "failed.csv")
    slower = [row | {"varied": json.dumps({"objective": "odd", "lr": 1.5e-4})} for row in sweep_rows("odd", ("0.6",))]
    pd.DataFrame(rows + sweep_rows("odd", ("0.1",)) + slower).to_csv(tmp_path / "rates.csv", index=False)
    assert "| `odd` | default | 0.10 " in table(tmp_path / "rates.csv")
    assert "| `odd` | 0.00015 | 0.60 " in table(tmp_path / "rates.csv")
    several = [row | {"varied": json.dumps({"objective": "guided", "model": "a"})} for row in rows]
    pd.DataFrame(several).to_csv(tmp_path / "several.csv", index=False)
    with pytest.raises(SystemExit, match="holds runs of several models"):
        table(tmp_path / "several.csv")
    assert (
        "| `told` | default | 0.20 [0.10, 0.30] | 0.10 [0.05, 0.15] | 0.75 [0.75, 0.75] | -1.5 to 2 | 2, 1 failed |"
        in text
    )
