"""The grids in examples/: every one of them trains, on a tiny model in place of the one it names."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, tiny_model
from transformers import AutoTokenizer

from ipissa.evaluate.yardsticks import ResponsePoint, response_symmetry
from ipissa.train import train
from ipissa.train.sweep import read_grid, run_sweep

GRIDS = sorted((ROOT / "examples" / "grids").glob("*.yaml"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"Tell me about the number {i}." for i in range(12)))
    return path


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_grid_that_ships_has_one_row_per_combination(
    path: Path, tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    assert len(read_grid(path)) == _size(yaml.safe_load(path.read_text())["grid"])
    grid = _shrunk(path, tiny, prompts, tmp_path)
    with run_sweep(read_grid(grid), tmp_path / "out", train).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["error"] for row in rows] == [""] * _size(yaml.safe_load(grid.read_text())["grid"])
    assert len({row["run"] for row in rows}) == len(rows)
    assert len({row["final_loss"] for row in rows}) > 1
    if path.stem in ("data_size", "rotate_u"):  # what they vary would be lost if so little were learnt from too few
        assert len({row["final_loss"] for row in rows}) == len(rows)
    with (tmp_path / "out" / "summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)  # one seed here, so nothing is summed up


def _grids(grid: Any) -> list[dict[str, list[Any]]]:
    return grid if isinstance(grid, list) else [grid]


def _size(grid: Any) -> int:
    return sum(math.prod(len(options) for options in each.values()) for each in _grids(grid))


# Of settings that count something, as there are only nine prompts to learn from.
FEWER: dict[str, list[Any]] = {"max_prompts": [3, 9], "epochs": [1, 2]}


def _few(options: list[Any]) -> int:
    """Two, and four where a setting is a cell of several: with and without either of two constraints."""
    return 4 if isinstance(options[0], dict) else 2


def _shrunk(path: Path, tiny: Path, prompts: Path, folder: Path) -> Path:
    """The same comparison with seconds of training: a few values of each setting, one seed, tiny models."""
    values = yaml.safe_load(path.read_text())
    grids = _grids(values["grid"])
    models = {name: _model(tiny, folder, i) for i, name in enumerate(grids[0].get("model", ["the only one"]))}
    values["base"] |= {
        "model": str(tiny / "model"),
        "prompts": str(prompts),
        "rank": 4,
        "max_new_tokens": 5,
        "teacher_top_k": 32,
        "batch_size": 8,
        "held_out": 3,
        "device": "cpu",
        "dtype": "float32",
        # As many steps for all, where their number is not what is compared.
        "trainer": {} if any("epochs" in each for each in grids) else {"max_steps": 2},
    }
    values["grid"] = [
        {name: FEWER.get(name, options[: _few(options)]) for name, options in each.items()} | {"seed": [0]}
        for each in grids
    ]
    for each in values["grid"]:
        if "model" in each:
            each["model"] = [models[name] for name in each["model"]]
    shrunk = folder / path.name
    shrunk.write_text(yaml.safe_dump(values))
    return shrunk


def _model(tiny: Path, folder: Path, seed: int) -> str:
    """The tiny model, or another one beside it: a base model, without a chat template."""
    if seed == 0:
        return str(tiny / "model")
    other = folder / f"model{seed}"
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(other)
    tiny_model("llama", vocab_size=len(tokenizer), seed=seed).save_pretrained(other)
    return str(other)


def test_symmetry_is_that_of_the_poles_and_0_where_both_go_one_way() -> None:
    def symmetry(up: float, down: float) -> float:
        return response_symmetry(
            [ResponsePoint(-1.0, down, 0.0), ResponsePoint(0.0, 0.0, 0.0), ResponsePoint(1.0, up, 0.0)]
        )

    assert symmetry(0.2, -0.4) == pytest.approx(0.5)
    assert symmetry(0.3, -0.3) == pytest.approx(1)
    assert symmetry(0.3, 0.3) == 0
