"""Sweeps: one row per run, resumable, medians that say how many seeds they rest on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ipissa import models
from ipissa.errors import ConfigError, ModelLoadError
from ipissa.train import TrainConfig
from ipissa.train.answers import digest
from ipissa.train.sweep import read_grid, run_sweep

GRID = "base: {positive: kind, negative: angry}\ngrid: {lr: [0.001, 0.003], seed: [0, 1, 2]}\n"


RESPONSE = [
    {"alpha": -1.0, "positive": -0.3, "negative": 0.1},
    {"alpha": 0.0, "positive": 0.0, "negative": 0.0},
    {"alpha": 1.0, "positive": 0.1, "negative": -0.1},
]


class Trainer:
    """Stands for training: gains that depend on the settings, and a count of runs."""

    def __init__(self) -> None:
        self.trained: list[TrainConfig] = []
        self.fails = False

    def __call__(self, config: TrainConfig, output: Path, *, resume: bool, shared: Path) -> Any:
        assert resume
        assert shared.name == "shared"
        self.trained.append(config)
        if self.fails and config.seed == 1:
            raise ModelLoadError("it does not work.")
        gain = {"value": config.lr * 100 + config.seed}
        pole = {"trait_gain": gain, "plain_gain": gain, "contrast": gain}
        return SimpleNamespace(
            yardsticks=SimpleNamespace(to_dict=lambda: {"positive": pole, "negative": pole}),
            adapter=SimpleNamespace(
                alpha_range=(-1.0, 2.0), evaluation={"training": {"final_loss": 0.1}, "response": RESPONSE}
            ),
            seconds=12.3,
        )


def configs(tmp_path: Path, text: str = GRID) -> list[TrainConfig]:
    (tmp_path / "grid.yaml").write_text(text)
    return read_grid(tmp_path / "grid.yaml")


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_combination_is_trained_once_and_summed_up_over_seeds(tmp_path: Path) -> None:
    train = Trainer()
    grid = configs(tmp_path)
    assert [(c.lr, c.seed) for c in grid] == [(lr, seed) for lr in (0.001, 0.003) for seed in (0, 1, 2)]
    rows = read(run_sweep(grid, tmp_path / "out", train))
    assert [row["run"] for row in rows] == [digest(config.to_dict() | config.contents()) for config in grid]
    summary = read(tmp_path / "out" / "summary.csv")
    assert [(row["varied"], row["runs"], row["enough_seeds"]) for row in summary] == [
        ('{"lr": 0.001}', "3", "yes"),
        ('{"lr": 0.003}', "3", "yes"),
    ]
    assert float(summary[0]["trait_gain_positive"]) == pytest.approx(1.1)  # the median seed is 1
    # Gains are lr * 100 + seed at either pole: 0.1, 1.1, 2.1 against 0.3, 1.3, 2.3, each of variance 1.
    assert [float(row["worse_gain_mean"]) for row in summary] == pytest.approx([1.1, 1.3])
    assert [float(row["worse_gain_sd"]) for row in summary] == pytest.approx([1, 1])
    assert summary[0]["against"] == summary[0]["t"] == ""
    assert summary[1]["against"] == '{"lr": 0.001}'
    assert float(summary[1]["t"]) == pytest.approx(0.2 / (2 / 3) ** 0.5, abs=0.01)
    assert float(summary[1]["p"]) == pytest.approx(0.819, abs=0.001)  # two-sided, 4 degrees of freedom
    assert {float(row["symmetry"]) for row in rows} == {0.5}  # 0.2 at +1, -0.4 at -1


def test_a_combination_is_compared_with_the_first_that_differs_in_one_setting_on_its_model(tmp_path: Path) -> None:
    grid = """
base: {positive: kind, negative: angry}
grid:
  - {lr: [0.001], rank: [8, 16], seed: [0, 1]}
  - {lr: [0.003], rank: [16], seed: [0, 1]}
  - {model: [other], lr: [0.001, 0.005], rank: [8], seed: [0, 1]}
"""
    run_sweep(configs(tmp_path, grid), tmp_path / "out", Trainer())
    found = [row["against"] and json.loads(row["against"]) for row in read(tmp_path / "out" / "summary.csv")]
    demo = TrainConfig("kind", "angry").model
    assert found == [
        "",
        {"model": demo, "lr": 0.001, "rank": 8},
        {"model": demo, "lr": 0.001, "rank": 16},
        "",  # nothing before it is on its model
        {"model": "other", "lr": 0.001, "rank": 8},
    ]


def test_a_sweep_begun_again_trains_only_what_is_missing(tmp_path: Path) -> None:
    first, second = Trainer(), Trainer()
    grid = configs(tmp_path)
    run_sweep(grid[:4], tmp_path / "out", first)
    run_sweep(grid, tmp_path / "out", second)
    assert second.trained == grid[4:]


def test_a_run_that_fails_has_a_row_that_says_so_and_does_not_count(tmp_path: Path) -> None:
    train = Trainer()
    train.fails = True
    rows = read(run_sweep(configs(tmp_path), tmp_path / "out", train))
    assert [row["error"] for row in rows] == ["", "it does not work.", ""] * 2
    assert [(r["failed"], r["enough_seeds"]) for r in read(tmp_path / "out" / "summary.csv")] == [("1", "no")] * 2
    again = Trainer()
    assert all(not row["error"] for row in read(run_sweep(configs(tmp_path), tmp_path / "out", again)))
    assert [config.seed for config in again.trained] == [1, 1]


@pytest.mark.parametrize("kind", [RuntimeError, AttributeError, KeyError, OSError])
def test_an_error_of_the_libraries_below_is_a_row_too(kind: type[Exception], tmp_path: Path) -> None:
    def failing(config: TrainConfig, *args: Any, **settings: Any) -> Any:
        raise kind("no memory is left")

    rows = read(run_sweep(configs(tmp_path)[:2], tmp_path / "out", failing))
    assert [row["error"] for row in rows] == [f"{kind.__name__}: {kind('no memory is left')}"] * 2


def test_rows_of_before_say_what_a_grid_that_has_grown_varies(tmp_path: Path) -> None:
    run_sweep(configs(tmp_path, GRID.replace("0.001, ", "")), tmp_path / "out", Trainer())
    assert {row["varied"] for row in read(tmp_path / "out" / "results.csv")} == {"{}"}
    longer = GRID.replace("[0, 1, 2]", "[0, 1, 2, 3]")
    run_sweep(configs(tmp_path, longer), tmp_path / "out", Trainer())
    assert [(row["varied"], row["runs"]) for row in read(tmp_path / "out" / "summary.csv")] == [
        ('{"lr": 0.001}', "4"),
        ('{"lr": 0.003}', "4"),
    ]


def test_rows_of_other_prompts_are_not_mixed_in(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Prompt {i}" for i in range(8)))
    grid = f"base: {{positive: kind, negative: angry, prompts: {prompts}}}\ngrid: {{seed: [0]}}\n"
    run_sweep(configs(tmp_path, grid), tmp_path / "out", Trainer())
    prompts.write_text("\n".join(f"Another {i}" for i in range(8)))
    with pytest.raises(ConfigError, match="put settings and prompts back"):
        run_sweep(configs(tmp_path, grid), tmp_path / "out", Trainer())


def test_runs_of_another_arithmetic_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "computes_in_bfloat16", lambda: True)
    grid = GRID.replace("angry", "angry, device: cpu")
    rows = read(run_sweep(configs(tmp_path, grid)[:2], tmp_path / "out", Trainer()))
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    monkeypatch.setattr(models, "computes_in_bfloat16", lambda: False)  # as on another machine
    with pytest.raises(ConfigError, match="holds runs in bfloat16, and here they would be in float32"):
        run_sweep(configs(tmp_path, grid), tmp_path / "out", Trainer())


def test_a_combination_in_two_grids_counts_once(tmp_path: Path) -> None:
    train = Trainer()
    text = "base: {positive: a, negative: b}\ngrid: [{lr: [1, 2], seed: [0]}, {lr: [2], rank: [8, 16], seed: [0]}]"
    rows = read(run_sweep(configs(tmp_path, text), tmp_path / "out", train))
    assert [(config.lr, config.rank) for config in train.trained] == [(1, 16), (2, 16), (2, 8)]
    assert len(rows) == 3


def test_several_grids_are_one_after_the_other(tmp_path: Path) -> None:
    text = "base: {positive: a, negative: b}\ngrid: [{lr: [1, 2], seed: [0]}, {depth_end: [0.5], seed: [0, 1]}]"
    assert [(c.lr, c.depth_end, c.seed) for c in configs(tmp_path, text)] == [
        (1, 0.9, 0), (2, 0.9, 0), (1.5e-3, 0.5, 0), (1.5e-3, 0.5, 1),
    ]  # fmt: skip


def test_runs_of_another_grid_are_not_mixed_in(tmp_path: Path) -> None:
    run_sweep(configs(tmp_path), tmp_path / "out", Trainer())
    longer = GRID.replace("0.003]", "0.003, 0.01]")
    assert len(read(run_sweep(configs(tmp_path, longer), tmp_path / "out", Trainer()))) == 9
    with pytest.raises(ConfigError, match="holds 9 runs that this grid does not have"):
        run_sweep(configs(tmp_path, GRID.replace("angry", "cruel")), tmp_path / "out", Trainer())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grid: {lr: [1]}", "needs base, a mapping, and grid"),
        ("base: {positive: a, negative: b}\ngrid: []", "a mapping or a list of them"),
        ("base: {positive: a, negative: b}\ngrid: {lr: 1}", "give a list of values"),
        ("base: {positive: a, negative: b}\ngrid: {speed: [1]}", "'speed' is unknown"),
        ("- 1", "is not a mapping"),
        ("base: {", "cannot be read"),
    ],
)
def test_grids_that_mean_nothing_are_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        configs(tmp_path, text)
