"""`ipissa calibrate`: the range of an adapter that has none that was read, or anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TRAIT
from evaluated import gentle
from typer.testing import CliRunner

import ipissa
from ipissa.adapter import Adapter, VectorAdapter, load_adapter, save_adapter
from ipissa.adapter.base_model import describe_base
from ipissa.cli import app
from ipissa.data.continuations import Sampling
from ipissa.data.prompts import load_prompts
from ipissa.errors import TrainingError
from ipissa.models import load_model
from ipissa.train.calibration import calibrate

TRAINED = {"max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9, "seed": 3, "prompts": None}


@pytest.fixture
def base(tiny: Path) -> tuple[Any, Any, dict[str, Any]]:
    model, tokenizer = load_model(str(tiny / "model"), device="cpu", dtype="float32")
    return model, tokenizer, describe_base(model, str(tiny / "model"))


def vector(base: Any, *, size: float) -> VectorAdapter:
    direction = size * torch.randn(32, generator=torch.Generator().manual_seed(0))
    return VectorAdapter(modules={"model.layers.2": direction}, base_model=base[2], trait=dict(TRAIT))


def run(adapter: Path, output: Path, *more: str) -> Any:
    options = ["--adapter", str(adapter), "--output", str(output), "--held-out", "3", "--dtype", "float32"]
    return CliRunner().invoke(app, ["calibrate", *options, "--device", "cpu", *more])


def test_an_imported_vector_gets_a_range_that_was_read(base: Any, tmp_path: Path) -> None:
    path, output = tmp_path / "v.safetensors", tmp_path / "read.safetensors"
    unread = save_adapter(vector(base, size=0.05), path)
    inspected = CliRunner().invoke(app, ["inspect", str(path)]).stdout
    assert "| α range | -1 to +1, not known to be read from text (`ipissa calibrate` reads it) |" in inspected

    result = run(path, output, "--max-new-tokens", "6")
    assert result.exit_code == 0, result.output
    found = load_adapter(output)
    model, tokenizer, _ = base
    prompts = load_prompts()[1][:3]
    expected = calibrate(ipissa.attach(model, unread), tokenizer, prompts, seed=0, sampling=Sampling(max_new_tokens=6))
    assert found.alpha_range == (expected.low, expected.high)
    assert found.alpha_range != unread.alpha_range
    assert found.evaluation["calibration"] == expected.to_dict()
    assert torch.equal(found.modules["model.layers.2"], unread.modules["model.layers.2"])
    assert load_adapter(path).digest == unread.digest != found.digest
    card = output.with_suffix(".md").read_text()
    low, high = found.alpha_range
    assert f"| calibrated α range | {low:+g} to {high:+g}, where generated text holds together |" in card
    assert "Answers to 3 held-out prompts, at α = 0 4 to each, of up to 6 tokens at temperature 0.8" in card
    assert str(found.digest) in card
    assert not path.with_suffix(".md").exists()


def test_a_range_is_read_as_the_training_had_it_and_the_card_keeps_how_it_was_made(
    base: Any, make_adapter: Callable[..., Adapter], tmp_path: Path
) -> None:
    model, tokenizer, base_model = base
    path = tmp_path / "kind.safetensors"
    evaluation = {"training": TRAINED, "calibration": {"points": []}}
    made = replace(gentle(make_adapter(model)), base_model=base_model, alpha_range=(-9.0, 9.0), evaluation=evaluation)
    before = save_adapter(made, path)
    told = "## How it was made\n\n```\nipissa train\n```\n\n## Samples\n\nMine."
    path.with_suffix(".md").write_text(f"# kind\n\nOld words.\n\n| sha256 | {before.digest} |\n\n{told}\n")

    result = run(path, path)
    assert result.exit_code == 0, result.output
    found = load_adapter(path)
    sampling = Sampling(max_new_tokens=5, temperature=0.7, top_p=0.9)
    expected = calibrate(ipissa.attach(model, before), tokenizer, load_prompts()[1][:3], seed=3, sampling=sampling)
    assert found.evaluation == {"training": TRAINED, "calibration": expected.to_dict()}
    assert found.alpha_range == (expected.low, expected.high)
    card = path.with_suffix(".md").read_text()
    assert card.startswith("# kind\n\n| | |\n")
    assert card.endswith(f"\n\n{told}\n")
    assert "Old words" not in card
    assert card.count(str(found.digest)) == 1
    again = run(path, path)
    assert again.exit_code == 0
    assert path.with_suffix(".md").read_text() == card


def test_what_cannot_be_calibrated_or_written_leaves_all_as_it_was(base: Any, tmp_path: Path) -> None:
    path, output = tmp_path / "v.safetensors", tmp_path / "read.safetensors"
    save_adapter(vector(base, size=1e4), path)
    result = run(path, output, "--max-new-tokens", "5")
    assert isinstance(result.exception, TrainingError)
    assert str(result.exception) == (
        "Text falls apart already at |α| = 0.5; α = 1 is too much of it: make it mean less (`ipissa import --scale` of "
        "a control vector), or train it at a lower --lr."
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["v.safetensors"]
    output.with_suffix(".md").write_text("My notes.")
    result = run(path, output)
    assert f"{output.with_suffix('.md')} is not the card of an adapter; move it away" in str(result.exception)
    assert output.with_suffix(".md").read_text() == "My notes."
