"""What sums up evaluations and sweeps, and the drawing of the loss."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from typer.testing import CliRunner

from ipissa.cli import app
from ipissa.errors import ConfigError
from ipissa.evaluate.clusters import clusters_of
from ipissa.evaluate.geometry import write_loss_geometry
from ipissa.evaluate.published import loss_gap
from ipissa.evaluate.report.seeds import FIGURES, summarise_seeds
from ipissa.evaluate.report.sweeps import figure_by, read_results, table_by


def evaluation(folder: Path, seed: int, gain: float, **settings: Any) -> Path:
    """A folder as `ipissa eval` leaves it, with the adapter and a method of a trait gain of 0.15 at the worse pole."""
    (folder / "tables").mkdir(parents=True)
    asked = {"dataset": "dilemmas.csv (sha256 0123)", "held_out": 9, "seed": seed}
    (folder / "settings.json").write_text(json.dumps({"adapter": "abc", "recipe": {"lr": 1}} | asked | settings))
    poles = [
        {"method": method, "pole": pole, "equal": True, "trait_gain": at_pole, "plain_gain": 0.1, "contrast": 1}
        | ({} if method == "adapter" else _more(gain - at_pole))
        for method, gains in {"adapter": (gain, gain), "caa": (0.3, 0.15)}.items()
        for pole, at_pole in zip("+-", gains, strict=True)
    ]
    pd.DataFrame(poles).to_csv(folder / "tables" / "yardsticks.csv")
    best = [{"method": "caa", "pole": pole, "trait_gain": 0.3, "degradation": 0.1} | _more(gain - 0.3) for pole in "+-"]
    pd.DataFrame(best).to_csv(folder / "tables" / "best.csv")
    row = {"method": "adapter", "first_shows": 0.97} | dict.fromkeys(FIGURES["methods"], 2 * gain)
    pd.DataFrame([row]).to_csv(folder / "tables" / "methods.csv")
    pd.DataFrame({"name": ["candour", "care"]}).to_csv(folder / "tables" / "values.csv")
    return folder


def _more(value: float) -> dict[str, float]:
    """How far the adapter is above, to within 0.1."""
    return {"adapter_more": value, "adapter_more_low": value - 0.1, "adapter_more_high": value + 0.1}


def test_seeds_are_summed_up_by_medians_with_range_and_count(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / f"{seed}", seed, gain) for seed, gain in enumerate((0.1, 0.5, 0.2))]
    command = ["medians", *map(str, folders), "--output", str(tmp_path / "out")]
    text = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert "Medians over 3 seeds, of one adapter" in text
    assert "Dilemmas: dilemmas.csv, about 'candour'." in text
    assert "0.2 [0.1, 0.5]" in text
    at_best = text.split("## On held-out texts, each at its best scale\n\n")[1].split("\n\n")[0].splitlines()
    assert [line.split(" | ")[0] for line in at_best[::2]] == ["| method", "| caa"]  # the adapter chooses no scale
    table = pd.read_csv(tmp_path / "out" / "medians.csv").set_index(["method", "figure"])
    figures = ["median", "lowest", "highest", "seeds"]
    assert list(table.loc[("adapter", "balanced_value"), figures]) == [0.4, 0.2, 1.0, 3]
    assert list(table.loc[("caa", "trait_gain worse"), figures]) == [0.15, 0.15, 0.15, 3]
    # The adapter has 0.1, 0.5 and 0.2, caa 0.3 and 0.15: intervals of differences end 0.1 from them.
    sides = ["above", "below"]
    assert list(table.loc[("caa", "adapter_more +"), [*figures, *sides]]) == pytest.approx([-0.1, -0.2, 0.2, 3, 1, 1])
    assert list(table.loc[("caa", "adapter_more -"), sides]) == [1, 0]
    assert list(table.loc[("caa", "adapter_more - at best"), sides]) == [1, 1]
    assert ("adapter", "adapter_more +") not in table.index
    assert table[sides].isna().loc[[("adapter", "balanced_p"), ("caa", "trait_gain +")]].all(axis=None)
    assert "Fewer than 3 seeds" in summarise_seeds(folders[:2], tmp_path / "two")


def test_folders_of_which_there_is_no_median_are_named(tmp_path: Path) -> None:
    whole, broken, other = (evaluation(tmp_path / name, seed, 0.1) for seed, name in enumerate("abc"))
    (broken / "tables" / "yardsticks.csv").unlink()
    with pytest.raises(ConfigError, match=r"evaluation in .*b is not complete; run it again"):
        summarise_seeds([whole, broken], tmp_path / "out")
    old = evaluation(tmp_path / "d", 3, 0.1)
    yardsticks = pd.read_csv(old / "tables" / "yardsticks.csv")
    yardsticks.drop(columns="adapter_more").to_csv(old / "tables" / "yardsticks.csv")
    with pytest.raises(ConfigError, match=r"d is of an earlier version, which compared no prompts; measure that seed"):
        summarise_seeds([whole, old], tmp_path / "out")
    (other / "settings.json").write_text('{"lr": 1}')
    with pytest.raises(ConfigError, match=r"is not of `ipissa eval`: it lacks adapter, recipe, seed"):
        summarise_seeds([whole, other], tmp_path / "out")


def test_random_adapters_of_all_seeds_are_compared_with_the_median_slope(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / f"{seed}", seed, gain) for seed, gain in enumerate((0.1, 0.5, 0.2))]
    for folder in folders:  # the median slope is 0.4
        random = {
            "seed": [1, 2, 3],
            "name": "candour",
            "scale": 1.0,
            "equal": True,
            "value": [-0.5, 0.1, 0.2],
            "t": [1.0, 1.0, 1.0],
        }
        pd.DataFrame(random).to_csv(folder / "tables" / "null.csv", index=False)
    text = summarise_seeds(folders, tmp_path / "out")
    assert "Of 9 random adapters that cost text as much, 67% move the balanced score less" in text
    assert "(p against them 0.400, of so few at least 0.100)" in text
    facts = json.loads((tmp_path / "out" / "medians.json").read_text())
    assert facts["chance"] in text
    assert facts["chance_p"] == pytest.approx(0.4)


def test_adapters_of_their_own_are_compared_with_medians_of_one_random_adapter_per_seed(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / f"{i}", i, gain, adapter=f"sha {i}") for i, gain in enumerate((0.1, 0.5, 0.2))]
    for folder in folders:
        random = {
            "seed": [1, 2, 3],
            "name": "candour",
            "scale": 1.0,
            "equal": [True, True, False],
            "value": [-0.5, 0.1, 9],
            "t": 1.0,
        }
        pd.DataFrame(random).to_csv(folder / "tables" / "null.csv", index=False)
    text = summarise_seeds(folders, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "medians.json").read_text())
    assert facts["chance"] in text
    assert "one of the random adapters that cost text as much (6 in all)" in text
    # All 27 ways to put a random slope, or the measured one, in the place of each of 0.2, 1.0 and 0.4.
    pools = [(-0.5, 0.1, own) for own in (0.2, 1.0, 0.4)]
    as_large = [abs(sorted(drawn)[1]) >= 0.4 for drawn in product(*pools)]
    assert facts["chance_p"] == pytest.approx(sum(as_large) / 27)
    pd.DataFrame(random).assign(equal=False).to_csv(folders[1] / "tables" / "null.csv", index=False)
    assert "nothing is said of chance" in summarise_seeds(folders, tmp_path / "out")
    (folders[1] / "tables" / "null.csv").unlink()
    assert f"nothing was compared with it in {folders[1]}." in summarise_seeds(folders, tmp_path / "out")


def test_adapters_of_one_recipe_are_summed_up_one_per_seed(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / f"{i}", i, 0.1, adapter=f"sha {i}") for i in range(3)]
    assert "each of an adapter of its own" in summarise_seeds(folders, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "medians.json").read_text()) == {
        "seeds": 3, "adapters": 3, "dataset": "dilemmas.csv", "target": "candour", "first_shows": 0.97
    }  # fmt: skip
    later = evaluation(tmp_path / "later", 4, 0.1, adapter="sha 4", recipe={"lr": 1, "depth_count": None})
    summarise_seeds([*folders, later], tmp_path / "later" / "out")  # a setting that was added, at its default
    again = evaluation(tmp_path / "again", 4, 0.1, adapter="sha 1")
    with pytest.raises(ConfigError, match="The 4 evaluations are of 3 adapters; use one, or one per seed"):
        summarise_seeds([*folders, again], tmp_path)
    other = evaluation(tmp_path / "other", 4, 0.1, adapter="sha 4", recipe={"lr": 2})
    with pytest.raises(ConfigError, match=r"differs from .* in recipe; only seeds, device and dtype may differ"):
        summarise_seeds([*folders, other], tmp_path)
    twice = [evaluation(tmp_path / f"t{i}", i, 0.1, adapter=f"sha {i}", trained_with_seed=7) for i in range(2)]
    with pytest.raises(ConfigError, match=r"trained with the seeds \[7, 7\]; use one adapter, or one per seed"):
        summarise_seeds(twice, tmp_path)
    unknown = [evaluation(tmp_path / f"u{i}", i, 0.1, adapter=f"sha {i}", recipe=None) for i in range(2)]
    with pytest.raises(ConfigError, match=r"differs from .* in adapter; only seeds, device and dtype may differ"):
        summarise_seeds(unknown, tmp_path)


def test_seeds_may_be_computed_on_different_machines_which_is_said(tmp_path: Path) -> None:
    machines = ({"dtype": "float32", "device": "cpu"}, *2 * [{"dtype": "float32", "device": "cuda"}])
    folders = [evaluation(tmp_path / f"{seed}", seed, 0.1, **machine) for seed, machine in enumerate(machines)]
    said = "Computed in float32 on cpu at seed 0, float32 on cuda at seed 1, float32 on cuda at seed 2."
    assert said in summarise_seeds(folders, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "medians.json").read_text())["computed_in"] == said
    assert "Computed in" not in summarise_seeds(folders[1:], tmp_path / "same")


def test_evaluations_that_differ_in_more_than_the_seed_are_not_summed_up(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "1", 0, 0.1)
    with pytest.raises(ConfigError, match=r"differs from .* in held_out; only seeds, device and dtype may differ"):
        summarise_seeds([one, evaluation(tmp_path / "2", 1, 0.1, held_out=8)], tmp_path)
    with pytest.raises(ConfigError, match=r"seeds \[0, 0\]; give one folder per seed"):
        summarise_seeds([one, evaluation(tmp_path / "3", 0, 0.1)], tmp_path)
    with pytest.raises(ConfigError, match="at least two seeds"):
        summarise_seeds([one], tmp_path)
    with pytest.raises(ConfigError, match="is not a folder that `ipissa eval` wrote"):
        summarise_seeds([one, tmp_path / "absent"], tmp_path)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two depths, two weight decays, three seeds; the gain is depth + weight decay + a little of the seed."""
    rows = [
        {
            "run": f"{depth}-{decay}-{seed}",
            "varied": json.dumps({"depth_end": depth, "weight_decay": decay, "target_modules": ["o_proj"]}),
            "seed": seed,
            "trait_gain_positive": depth + decay + seed / 100,
            "trait_gain_negative": depth,
            "plain_gain_positive": 0.0,
            "plain_gain_negative": 0.0,
            "symmetry": depth / 2,
            "final_loss": 1.0,
            "error": "",
        }
        for depth in (0.5, 0.9)
        for decay in (0.0, 0.1)
        for seed in range(3)
    ]
    rows.append({**rows[0], "run": "failed", "error": "The loss is nan", "trait_gain_positive": ""})
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    return tmp_path / "results.csv"


def test_a_setting_of_a_sweep_is_compared_within_equal_other_settings(results: Path) -> None:
    table = table_by(read_results(results), "depth_end")
    assert list(table["depth_end"]) == [0.5, 0.9, 0.5, 0.9]
    assert list(table["weight_decay"]) == [0.0, 0.0, 0.1, 0.1]
    assert list(table["runs"]) == [3] * 4
    assert table["enough_seeds"].all()
    assert list(table["trait_gain_positive"]) == pytest.approx([0.51, 0.91, 0.61, 1.01])
    assert list(table["symmetry"]) == pytest.approx([0.25, 0.45, 0.25, 0.45])


def test_a_sweep_over_a_setting_that_has_a_column_of_its_own_has_a_table(results: Path) -> None:
    table = pd.read_csv(results)
    varied = [json.loads(each) | {"dtype": "float32"} for each in table["varied"]]
    table.assign(dtype="fast", varied=[json.dumps(each) for each in varied]).to_csv(results, index=False)
    assert set(read_results(results)["dtype"]) == {"float32"}
    assert len(table_by(read_results(results), "dtype")) == 4


def test_tables_and_figures_of_a_sweep_are_generated_from_its_csv(results: Path, tmp_path: Path) -> None:
    for setting in ("depth_end", "weight_decay", "target_modules"):
        command = ["table", str(results), "--by", setting, "--output", str(tmp_path)]
        assert setting in CliRunner().invoke(app, command, catch_exceptions=False).stdout
        assert len(pd.read_csv(tmp_path / f"by-{setting}.csv")) == 4
        assert (tmp_path / f"by-{setting}-trait_gain_positive.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_of_a_sweep_has_a_line_per_combination_and_keeps_settings_that_are_none(results: Path) -> None:
    drawn = figure_by(read_results(results), "depth_end").axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn.lines}
    assert lines == {
        'target_modules ["o_proj"], weight_decay 0.0': pytest.approx([0.51, 0.91]),
        'target_modules ["o_proj"], weight_decay 0.1': pytest.approx([0.61, 1.01]),
    }
    table = read_results(results)
    table["weight_decay"] = table["weight_decay"].where(table["weight_decay"] > 0)
    drawn = figure_by(table, "weight_decay").axes[0]
    assert {tick.get_text() for tick in drawn.get_xticklabels()} == {"none", "0.1"}
    assert len(drawn.collections[0].get_offsets()) == len(table)


def test_a_setting_that_was_not_varied_and_files_of_others_are_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did not vary 'rank'; it varied depth_end"):
        table_by(read_results(results), "rank")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"is not a results.csv"):
        read_results(tmp_path / "other.csv")
    command = ["table", str(results), "--by", "depth_end", "--output", str(tmp_path), "--figure", "beauty"]
    with pytest.raises(ConfigError, match="figure 'beauty' is unknown"):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_the_loss_gap_is_held_out_less_training_loss_since_the_last_validation() -> None:
    nan = np.nan
    history = pd.DataFrame(
        {"loss": [9.0, 8.0, nan, 3.0, 5.0, nan, 1.0], "eval_loss": [nan, nan, 9.5, nan, nan, 6.0, nan]}
    )
    assert loss_gap(history) == pytest.approx(6.0 - 4.0)
    assert loss_gap(history.iloc[:3]) == pytest.approx(9.5 - 8.5)
    assert loss_gap(history[["loss"]]) is None
    assert loss_gap(history.iloc[:2]) is None


def test_values_belong_to_the_cluster_that_a_word_of_theirs_names() -> None:
    found = clusters_of(["Value/honesty", "Do not deceive", "Virtue/Courage", "professional care", "MFT/Loyalty"])
    assert found == {
        "Value/honesty": "Conscientiousness",
        "Do not deceive": "Conscientiousness",
        "Virtue/Courage": "Agent",
        "professional care": "Assistant",
    }


def test_the_loss_is_drawn_with_every_vector_named(tmp_path: Path) -> None:
    write_loss_geometry(tmp_path / "loss.svg")
    found, shipped = (_texts(path) for path in (tmp_path / "loss.svg", ROOT / "docs" / "loss-geometry.svg"))
    assert found == shipped
    assert found >= {
        "h chosen", "h rejected", "u, preference direction", "reference separation", "α = +1", "α = -1",
        "projection at +1", "projection at -1", "coherent: own tokens lose at most τ",
    }  # fmt: skip


def _texts(path: Path) -> set[str]:
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    return {"".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("}text")}
