"""One evaluation of a tiny model by the command, which the tests of its report and of its ranking share."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_adapter, tiny_model
from typer.testing import CliRunner

from ipissa.adapter import Adapter, save_adapter
from ipissa.cli import app
from ipissa.data.datasets import load_items
from ipissa.data.items import CHOICES, Dataset
from ipissa.evaluate.compare import Measured
from ipissa.evaluate.report.parts import measured_from_json
from ipissa.evaluate.scoring import find_choices

METHODS = ["adapter", "prompt", "caa", "random"]
ASKED = [f"{value}-{n}" for value, numbers in {
    "honesty": (1, 2, 3, 11, 12, 13), "kindness": (1, 2, 8, 9), "maths": (1, 2, 3), "preference": (1, 2, 3)
}.items() for n in numbers]  # fmt: skip
ALPHAS = 4


def gentle(adapter: Adapter) -> Adapter:
    modules = {
        name: replace(factors, rotation_v=0.1 * factors.rotation_v, delta_s=0.1 * factors.delta_s)
        for name, factors in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


@pytest.fixture(scope="session")
def home(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that mostly answers Yes or No, an adapter for it, and prompts."""
    folder = tmp_path_factory.mktemp("eval")
    model = tiny_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        for choice in find_choices(tokenizer, CHOICES):
            for (token,) in choice.variants:
                model.lm_head.weight[token] *= 8
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_adapter(gentle(random_adapter(model, suffixes=("o_proj",), seed=7)), folder / "honest.safetensors")
    (folder / "prompts.txt").write_text("\n".join(f"Tell me about the number {i}." for i in range(8)))
    bundled = files("ipissa.data").joinpath("items.jsonl").read_text(encoding="utf-8").splitlines()
    some = [line for line in bundled if json.loads(line)["dilemma"] in ASKED]
    (folder / "items.jsonl").write_text("\n".join(some))
    return folder


def arguments(home: Path, *more: str) -> list[str]:
    return [
        "eval", "--adapter", str(home / "honest.safetensors"), "--output", str(home / "report"),
        "--model", str(home / "model"), "--prompts", str(home / "prompts.txt"),
        "--baselines", ", ".join(METHODS[1:]), "--null", "5", "--dataset", str(home / "items.jsonl"),
        "--target", "honesty", "--alphas", "0.5", "--dtype", "float32", *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def printed(home: Path) -> str:
    """What the command prints after it wrote the report."""
    return CliRunner().invoke(app, arguments(home), catch_exceptions=False).stdout


@pytest.fixture(scope="session")
def report(home: Path, printed: str) -> Path:
    return home / "report"


@pytest.fixture(scope="session")
def dataset(home: Path) -> Dataset:
    return load_items(home / "items.jsonl", target="honesty")


@pytest.fixture(scope="session")
def measured(report: Path) -> list[Measured]:
    return [measured_from_json(json.loads((report / "parts" / f"{name}.json").read_text())) for name in METHODS]
