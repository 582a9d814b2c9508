"""`ipissa eval` from its arguments to the page, on a tiny model that answers Yes or No."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from evaluated import ALPHAS, ASKED, METHODS, arguments
from markupsafe import escape
from typer.testing import CliRunner

import ipissa
from ipissa.adapter import load_adapter, save_adapter
from ipissa.cli import app
from ipissa.data.items import Dataset
from ipissa.data.prompts import load_prompts
from ipissa.errors import ConfigError
from ipissa.evaluate import bench, run
from ipissa.evaluate.analysis import label_overlap
from ipissa.evaluate.baselines.tuners import adapters_objective as objective_of
from ipissa.evaluate.choices import measure_choices
from ipissa.evaluate.compare import Measured
from ipissa.evaluate.null import median_p, null_check
from ipissa.evaluate.report.page import Findings, summary, write_report
from ipissa.evaluate.report.parts import Parts
from ipissa.evaluate.run import evaluate
from ipissa.evaluate.settings import EvalSettings
from ipissa.evaluate.slopes import balanced_slope, with_labels
from ipissa.evaluate.steerer import Steerer
from ipissa.models import load_model
from ipissa.steering import attach
from ipissa.train import TrainConfig, answers, train


def test_the_command_prints_yardsticks_first_then_slopes_and_where_chance_puts_them(printed: str) -> None:
    head, slopes, ranking, chance = (
        printed.index(text)
        for text in ("| trait gain + ", "| balanced slope |", "By balanced slope", "random adapters")
    )
    assert head < slopes < ranking < chance
    assert all(printed.count(f"| {name} |") == 2 for name in METHODS)


def test_every_row_table_and_figure_is_written(report: Path) -> None:
    choices = json.loads((report / "choices.json").read_text())
    assert len(choices["items"]) == 2 * len(ASKED)
    assert {name: len(rows) for name, rows in choices["rows"].items()} == {
        name: 2 * len(ASKED) * (3 if name == "prompt" else ALPHAS) for name in METHODS
    }
    for name in ("yardsticks", "best", "degradation", "methods", "dose", "values", "pareto", "null"):
        assert not pd.read_csv(report / "tables" / f"{name}.csv").empty
    for name in ("yardsticks", "dose", "pareto", "values", "null"):
        assert (report / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert [each["method"] for each in json.loads((report / "yardsticks.json").read_text())["methods"]] == METHODS
    assert set(pd.read_csv(report / "tables" / "best.csv")["method"]) == {"caa", "random"}
    assert (report / "texts.md").read_text().count("| told | steered |") == 2
    assert (report / "yardsticks.md").read_text().startswith("| method |")


def test_the_page_holds_everything_itself_and_has_the_yardsticks_first(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((report / "figures").iterdir())) >= 5
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[:3] == [f"Does it steer: {what}" for what in ("text", "each at its own best scale", "dilemmas")]
    assert "honesty" in page
    assert "items.jsonl (sha256 " in page
    assert str(report.parent) not in page  # files are named, not where they lie
    assert "&lt;" not in page.split("<h2>Told and steered")[0]  # tables are tables, not their source


def test_the_page_shows_figures_with_their_intervals_and_every_answer(report: Path, measured: list[Measured]) -> None:
    page = (report / "report.html").read_text()
    table = re.findall(r"<table.*?</table>", page, re.DOTALL)[0]
    head, *rows = (re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL))
    assert head[:5] == ["method", "scale", "equal degradation", "pole", "trait gain"]
    assert head[-1] == "degradation (nats)"
    assert float(rows[1][-1]) == pytest.approx(measured[0].cost(-1.0), rel=1e-2)
    assert [row[0] for row in rows] == [name for name in METHODS for _ in range(2)]
    assert [row[2] for row in rows[:4]] == ["yes", "yes", "", ""]  # prompts have no cost to choose
    gain = measured[0].yardsticks.negative.trait_gain
    assert rows[1][4] == f"{gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}]"
    answers = json.loads((report / "parts" / "told-and-steered.json").read_text())
    assert len(answers) == 3 * page.split("<h2>Told and steered")[1].count("<h3>") == 6
    assert all(str(escape(each[key])) in page for each in answers for key in ("prompt", "told", "steered"))


def test_the_page_says_the_loss_gap_where_the_run_is_beside_the_adapter(home: Path, report: Path) -> None:
    line = "Held-out less training loss when it was trained"
    assert line not in (report / "report.html").read_text()
    run = home / "honest.run"
    run.mkdir()
    (run / "history.csv").write_text("step,loss,eval_loss\n1,3.0,\n2,5.0,\n2,,6.5\n")
    CliRunner().invoke(app, arguments(home), catch_exceptions=False)
    page = (report / "report.html").read_text()
    shutil.rmtree(run)
    assert f"{line}: 2.500 nats." in page


def test_an_evaluation_begun_again_measures_only_what_is_missing(home: Path, report: Path, printed: str) -> None:
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (report / "parts").iterdir()}

    before = times()
    (report / "parts" / "caa.json").unlink()
    again = CliRunner().invoke(app, arguments(home), catch_exceptions=False).stdout
    assert again == printed
    after = times()
    assert {name for name in before if before[name] != after[name]} == {"caa.json"}


def test_a_folder_of_another_evaluation_is_refused(home: Path, report: Path) -> None:
    with pytest.raises(ConfigError, match="holds an evaluation with another max_items, seed"):
        CliRunner().invoke(app, arguments(home, "--seed", "1", "--max-items", "10"), catch_exceptions=False)


def test_the_table_of_methods_has_every_figure_of_every_method(
    report: Path, measured: list[Measured], dataset: Dataset
) -> None:
    table = pd.read_csv(report / "tables" / "methods.csv").set_index("method")
    assert list(table.index) == METHODS
    wanted = {
        "balanced_value", "balanced_clustered", "balanced_paired", "acquiescence_value", "plain_value",
        "published_effect", "published_gain", "once_negated_slope_by_p", "transfer", "steering_f1", "symmetry",
        "opposite", "dose_monotonic", "flips_towards_at_plus", "prompt_degradation", "coherent", "valid",
    }  # fmt: skip
    assert wanted <= set(table.columns)
    rows = measured[0].rows
    assert rows is not None
    whole = rows[rows.groupby("item")["valid"].transform("all").astype(bool)]
    labels = {i: item.labels["honesty"] for i, item in enumerate(dataset.items) if "honesty" in item.labels}
    expected = balanced_slope(with_labels(whole[whole["alpha"] != 0.5], labels)).trait
    assert table.loc["adapter", "balanced_value"] == pytest.approx(expected.value)
    assert table.loc["adapter", "balanced_t"] == pytest.approx(expected.t)
    dose = pd.read_csv(report / "tables" / "dose.csv").set_index(["method", "alpha"])
    own = with_labels(whole, labels)

    def level(alpha: float) -> float:
        at = own[own["alpha"] == alpha]
        return (at[at["label"] == 1]["log_odds"].mean() - at[at["label"] == -1]["log_odds"].mean()) / 2

    assert dose.loc[("adapter", 0.5), "change"] == pytest.approx(level(0.5) - level(0.0))


def test_a_method_that_leaves_dilemmas_no_answer_is_left_out_and_costs_no_report(
    home: Path, measured: list[Measured], dataset: Dataset, tmp_path: Path
) -> None:
    def findings(lost: int) -> Findings:
        rows = measured[lost].rows
        assert rows is not None
        some = [*measured[:lost], replace(measured[lost], rows=rows.assign(valid=False)), *measured[lost + 1 :]]
        adapter = load_adapter(home / "honest.safetensors")
        return Findings(
            EvalSettings(), adapter, dataset, some, best=[], tuning=24, texts=[], echoes={"+": [], "-": []}, null=None
        )

    write_report(findings(1), tmp_path)
    assert list(pd.read_csv(tmp_path / "tables" / "methods.csv")["method"]) == [METHODS[0], *METHODS[2:]]
    said = f"Left out, as too few dilemmas kept an answer: {METHODS[1]}."
    assert said in summary(findings(1))
    assert said in (tmp_path / "report.html").read_text()
    write_report(findings(0), tmp_path / "none")
    said = (
        "With adapter 0 dilemmas about &#39;honesty&#39; have an answer at α = -1, 0 and 1, only 0 of them of the rarer"
    )
    assert said in (tmp_path / "none" / "report.html").read_text()
    assert "With adapter 0 dilemmas" in summary(findings(0))
    assert "trait gain" in summary(findings(0))  # the text says what it says


def test_a_folder_takes_other_settings_until_something_was_measured_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    Parts(folder, {"seed": 0})  # and then something was refused
    Parts(folder, {"seed": 1}).save("adapter", 1)
    with pytest.raises(ConfigError, match="holds an evaluation with another seed; choose another --output"):
        Parts(folder, {"seed": 0})
    assert Parts(folder, {"seed": 1}).load("adapter") == 1


def test_a_folder_takes_other_methods_and_says_which_its_report_has(tmp_path: Path) -> None:
    def said() -> Any:
        return json.loads((tmp_path / "settings.json").read_text())

    first, second = ({"seed": 0, "baselines": names, "null": null} for names, null in ((["caa"], 5), (["lora"], 9)))
    Parts(tmp_path, first).save("adapter", 1)
    parts = Parts(tmp_path, second)
    assert parts.load("adapter") == 1
    assert said() == first  # until there is a report of the others
    parts.write_settings()
    assert said() == second


def test_a_figure_that_is_no_number_is_named_before_it_is_kept(tmp_path: Path) -> None:
    parts = Parts(tmp_path, {"seed": 0})
    with pytest.raises(ConfigError, match="lora: a figure is no finite number"):
        parts.save("lora", {"cost": float("nan")})
    assert parts.load("lora") is None


def test_an_evaluation_does_not_go_on_with_other_weights(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "model", tmp_path / "model")
    settings = EvalSettings(
        model=str(tmp_path / "model"), prompts=str(home / "prompts.txt"), dataset=None, baselines=()
    )
    evaluate(home / "honest.safetensors", tmp_path / "report", settings)
    (tmp_path / "report" / "parts" / "told-and-steered.json").unlink()
    model, _ = load_model(str(tmp_path / "model"))
    with torch.no_grad():
        model.get_input_embeddings().weight *= 1.001
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"The weights of .*model are not those that this evaluation began with"):
        evaluate(home / "honest.safetensors", tmp_path / "report", settings)


def test_the_search_for_a_random_adapters_scale_begins_at_the_last_one_that_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[float] = []
    found = iter([(2.0, True), (1024.0, False), (3.0, True), (4.0, True), (5.0, True)])

    def slopes(*_: Any, seed: int, start: float, **__: Any) -> list[dict[str, Any]]:
        starts.append(start)
        scale, equal = next(found)
        return [{"seed": seed, "scale": scale, "equal": equal, "name": "honesty"}]

    monkeypatch.setattr(run, "null_slopes", slopes)
    settings = EvalSettings(null=5)
    bench_ = SimpleNamespace(settings=settings, parts=Parts(tmp_path, {}), materials=None, degradation=0.1)
    assert len(run._random_slopes(bench_, None)) == 5  # type: ignore[arg-type]
    assert starts == [1.0, 2.0, 2.0, 3.0, 4.0]


def test_vectors_that_were_measured_can_be_attached_at_the_scale_they_had(
    home: Path, report: Path, measured: list[Measured], dataset: Dataset
) -> None:
    caa = next(each for each in measured if each.method == "caa")
    model, tokenizer = load_model(str(home / "model"), device="cpu", dtype="float32")
    steered = attach(model, load_adapter(report / "adapters" / "caa.safetensors"))
    rows = measure_choices(Steerer(steered), tokenizer, dataset, [1.0])
    expected = caa.rows
    assert expected is not None
    at_one = expected[expected["alpha"] == 1].set_index("item")["yes"]
    assert rows[rows["alpha"] == 1].set_index("item")["yes"].to_numpy() == pytest.approx(at_one.to_numpy(), abs=1e-3)


def test_control_items_are_among_the_values_that_are_reported(report: Path) -> None:
    values = pd.read_csv(report / "tables" / "values.csv")
    assert set(values["name"]) == {"honesty", "kindness", "maths", "preference"}
    assert {"p_holm", "p_bh", "low", "high"} <= set(values.columns)


def test_values_say_how_far_they_are_the_target_under_another_name(report: Path, dataset: Dataset) -> None:
    values = pd.read_csv(report / "tables" / "values.csv").groupby("name").first()
    assert list(values.loc["honesty", ["shared", "agree"]]) == [12, 1.0]
    assert values.loc["maths", "shared"] == 0
    labels = {"candour": {0: 1, 1: -1, 2: 1, 3: -1}, "care": {1: 1, 2: 1, 3: 1, 9: -1}}
    found = label_overlap(labels, "candour").set_index("name")
    assert list(found.loc["care"]) == [3, pytest.approx(1 / 3)]


def test_every_value_is_placed_among_what_random_adapters_do_to_it(report: Path) -> None:
    values = pd.read_csv(report / "tables" / "values.csv")
    random = pd.read_csv(report / "tables" / "null.csv")
    own = values[values["method"] == "adapter"].set_index("name")
    for name, slope in own["value"].items():
        others = random[(random["name"] == name) & random["equal"]]["value"].abs()
        as_large = sum(other >= abs(slope) for other in others)
        assert own.loc[name, "p_chance"] == pytest.approx((1 + as_large) / (1 + len(others)))
    assert values.loc[values["method"] != "adapter", "p_chance"].isna().all()


def test_the_report_has_paired_differences_to_every_other_method(report: Path) -> None:
    for name in ("yardsticks", "best"):
        table = pd.read_csv(report / "tables" / f"{name}.csv").set_index(["method", "pole"])
        equal = pd.read_csv(report / "tables" / "yardsticks.csv").set_index(["method", "pole"])
        for (method, pole), row in table.iterrows():
            if method == "adapter":
                assert pd.isna(row["adapter_more"])
            else:
                apart = equal.loc[("adapter", pole), "trait_gain"] - row["trait_gain"]
                assert row["adapter_more"] == pytest.approx(apart, abs=2e-3)
                assert row["adapter_more_low"] <= row["adapter_more"] <= row["adapter_more_high"]


def test_a_slope_is_placed_among_those_of_random_adapters() -> None:
    random = pd.DataFrame({"value": [0.1, -0.2, 0.3, -0.4], "t": [1.0, -2.0, 3.0, -0.5], "equal": True})
    found = null_check(-0.35, random)
    assert (found.seeds, found.share_below, found.median_t, found.largest_slope) == (4, 0.75, 1.5, 0.4)
    assert found.p == pytest.approx(2 / 5)
    assert "75%" in found.sentence()
    assert "(p against them 0.400, of so few at least 0.200)" in found.sentence()
    assert "left out" not in found.sentence()


def test_random_adapters_that_cost_less_say_nothing_of_chance() -> None:
    random = pd.DataFrame({"value": [0.1, 0.0, None], "t": [1.0, 0.0, None], "equal": [True, False, False]})
    found = null_check(0.05, random)
    assert (found.seeds, found.left_out, found.p) == (1, 2, 1.0)
    assert (
        "2 more are left out: none of them could be brought to that cost with enough answers left" in found.sentence()
    )
    assert null_check(0.05, random[1:]).sentence().startswith("None of 2 random adapters")


def test_random_adapters_that_all_lost_their_answers_cost_no_report() -> None:
    without = pd.DataFrame(
        {"seed": [1, 2], "scale": 2.0, "equal": False, "name": "honesty"}
    )  # as `null_slopes` says it
    assert null_check(0.05, without).sentence().startswith("None of 2 random adapters could be brought to that cost")
    assert median_p([0.1, 0.2], [without, without]) is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"baselines": ("magic",)}, "baseline 'magic' is unknown"),
        ({"alphas": (float("nan"),)}, "no α"),
        ({"null": 2}, "null 2 random adapters say nothing"),
        ({"null": 1001}, "null 1001 random adapters are more than there are seeds"),
        ({"seed": -1}, "seed -1 is not between 0 and 4000000"),
        ({"null": 9, "dataset": None}, "null is of dilemmas, and there is no data set"),
        ({"topic": "lies", "dataset": None}, "topic is of dilemmas, and there is no data set"),
        ({"baselines": ("caa", "prompt", "caa")}, "baseline 'caa' is named 2 times"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EvalSettings(**settings)


def test_methods_that_are_trained_learn_anew_with_every_seed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainConfig("kind", "angry", rank=4, seed=5, epochs=1, batch_size=4, continuations=1, max_new_tokens=4)
    path = home / "trained.safetensors"
    save_adapter(replace(load_adapter(home / "honest.safetensors"), evaluation={"training": training.to_dict()}), path)
    seeds = []
    monkeypatch.setattr(bench, "adapters_objective", lambda *asked: seeds.append(asked[3].seed) or objective_of(*asked))
    for seed in (0, 2):
        settings = EvalSettings(
            model=str(home / "model"), prompts=str(home / "prompts.txt"), dataset=None, null=0,
            baselines=("lora",), seed=seed,
        )  # fmt: skip
        evaluate(str(path), home / f"trained-{seed}", settings)
    assert seeds == [0, 2]


def test_lora_learns_what_a_contrastive_adapter_did_and_loreft_cannot(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TrainConfig(
        "kind", "angry", rank=4, epochs=1, batch_size=4, continuations=1, max_new_tokens=4, max_prompts=4,
        objective="contrastive", contrastive={"last_tokens": 2},
    )  # fmt: skip
    path = home / "contrastive.safetensors"
    save_adapter(replace(load_adapter(home / "honest.safetensors"), evaluation={"training": training.to_dict()}), path)
    settings = EvalSettings(
        model=str(home / "model"), prompts=str(home / "prompts.txt"), dataset=None, baselines=("lora",)
    )
    made = []

    def objective(*asked: Any) -> Any:
        found = objective_of(*asked)
        made.append(type(found).__name__)
        return found

    monkeypatch.setattr(bench, "adapters_objective", objective)
    evaluate(str(path), home / "contrastive report", settings)
    found = pd.read_csv(home / "contrastive report" / "tables" / "yardsticks.csv")
    assert found.query("method == 'lora'")["trait_gain"].abs().max() > 0
    assert made == ["Contrastive"]
    with pytest.raises(ConfigError, match=r"trained with objective 'contrastive', .* leave out reft"):
        evaluate(str(path), home / "refused", replace(settings, baselines=("lora", "reft")))


def test_what_was_asked_for_the_adapter_is_not_asked_again_for_methods_that_are_trained(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TrainConfig(
        "kind", "angry", model=str(home / "model"), prompts=str(home / "prompts.txt"), rank=4, epochs=1, batch_size=4,
        max_new_tokens=4, held_out=2, lr=1e-3,
    )  # fmt: skip
    train(training, home / "two words.safetensors", shared=home / "shared")
    kept = {path: path.stat().st_mtime_ns for path in (home / "shared").iterdir()}
    monkeypatch.setattr(answers, "sample_continuations", None)
    monkeypatch.setattr(answers, "build_targets", None)
    options = ["--adapter", "two words.safetensors", "--baselines", "lora,reft", "--dataset", "", "--target", "",
               "--null", "0", "--dtype", "fast", "--output", "shared report", "--shared", "shared"]  # fmt: skip
    monkeypatch.chdir(home)
    CliRunner().invoke(app, arguments(home, *options), catch_exceptions=False)
    assert (home / "shared report" / "report.html").exists()
    assert not (home / "shared report" / "state").exists()
    assert {path: path.stat().st_mtime_ns for path in (home / "shared").iterdir()} == kept


def test_trained_methods_learn_from_the_adapters_prompts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = home / "own.txt"
    own.write_text("\n".join(f"Own prompt {i}" for i in range(12)))
    training = TrainConfig(
        "kind", "angry", rank=4, epochs=1, batch_size=4, max_new_tokens=4, prompts=str(own), validation=0.3, patience=1
    )
    path = home / "own.safetensors"
    save_adapter(replace(load_adapter(home / "honest.safetensors"), evaluation={"training": training.to_dict()}), path)
    learnt: list[str] = []

    def objective(*asked: Any) -> Any:
        found = objective_of(*asked)
        learnt.extend(found.prompts)
        return found

    monkeypatch.setattr(bench, "adapters_objective", objective)
    settings = EvalSettings(
        model=str(home / "model"), prompts=str(home / "prompts.txt"), dataset=None, baselines=("reft",)
    )
    evaluate(str(path), home / "own report", settings)
    assert learnt == [f"Own prompt {i}" for i in range(12) if i % 4 != 3]
    own.unlink()
    with pytest.raises(ConfigError, match=r"cannot be learnt from anew: The prompts file .* leave out lora, dora and"):
        evaluate(str(path), home / "gone", settings)


def test_prompts_that_the_adapter_learnt_from_are_not_held_out(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [f"Own prompt {i}" for i in range(12)]
    own, shifted = home / "learnt.txt", home / "shifted.txt"
    own.write_text("\n".join(lines))
    shifted.write_text("\n".join(["One more", *lines[:8], lines[11], lines[10], lines[9]]))  # 2, 6 and 9 are held out
    training = TrainConfig("kind", "angry", prompts=str(own)).to_dict()
    adapter = replace(load_adapter(home / "honest.safetensors"), evaluation={"training": training})
    held_out = load_prompts(shifted)[1]
    assert held_out == [lines[2], lines[6], lines[9]]
    with pytest.raises(ConfigError, match=r"learnt from 3 of 3 held-out prompts; give others with --prompts"):
        bench.unseen(adapter, held_out)
    assert bench.unseen(adapter, [*held_out, lines[3], "New"]) == [lines[3], "New"]
    assert "3 held-out prompts are left out" in caplog.text
    own.unlink()
    assert bench.unseen(adapter, held_out) == held_out
    assert "some held-out prompts may be among them" in caplog.text


def test_an_evaluation_begun_again_reads_the_texts_that_it_had(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(**more: Any) -> EvalSettings:
        return EvalSettings(model=str(home / "model"), prompts=str(home / "prompts.txt"), dataset=None, **more)

    adapter, folder = home / "honest.safetensors", home / "again"
    whole = evaluate(adapter, folder, settings(baselines=("caa",))).measured
    (folder / "parts" / "caa.json").unlink()
    monkeypatch.setattr(bench, "sample_continuations", None)
    monkeypatch.setattr(bench, "sample_plain", None)
    again = evaluate(adapter, folder, settings(baselines=("caa",))).measured
    for name in ("trait_gain", "plain_gain", "contrast"):  # other batches round otherwise
        found, expected = (getattr(each[1].yardsticks.positive, name).value for each in (again, whole))
        assert found == pytest.approx(expected, abs=1e-3)


def test_what_figures_depend_on_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    said = EvalSettings(device="cpu").described()
    assert (said["device"], said["dtype"], said["ipissa"]) == ("cpu", "bfloat16", ipissa.__version__)
    assert said["prompts"].startswith("bundled (")
    assert "items.jsonl (sha256" in said["dataset"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert EvalSettings(device="cpu").described()["dtype"] == "float32"


def test_a_vector_is_not_compared_with_methods_that_take_its_modules(home: Path, report: Path) -> None:
    vector = str(report / "adapters" / "caa.safetensors")
    with pytest.raises(ConfigError, match=r"is a vector, without modules and rank .* leave out random, null"):
        evaluate(vector, home / "vector", EvalSettings(baselines=("prompt", "random"), null=5))


def test_without_dilemmas_there_are_yardsticks_and_texts(home: Path) -> None:
    options = ["--dataset", "", "--target", "", "--null", "0", "--baselines", "", "--output", str(home / "texts only")]
    result = CliRunner().invoke(app, arguments(home, *options), catch_exceptions=False)
    assert "trait gain" in result.stdout
    assert "balanced" not in result.stdout
    assert not (home / "texts only" / "choices.json").exists()
    assert "dilemmas" not in (home / "texts only" / "report.html").read_text()


def test_a_number_that_is_none_is_named(home: Path) -> None:
    with pytest.raises(ConfigError, match="alphas hold 'one'"):
        CliRunner().invoke(app, arguments(home, "--alphas", "one,0"), catch_exceptions=False)


def test_missing_answers_survive_the_way_to_disk_and_back(measured: list[Measured]) -> None:
    rows = measured[0].rows
    assert rows is not None
    assert rows["log_odds"].dtype == float
    assert (rows["log_odds"].isna() == ~rows["valid"].astype(bool)).all()
    assert np.isfinite(rows.loc[rows["valid"].astype(bool), "log_odds"]).all()
