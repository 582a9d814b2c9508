"""Whole training runs on a tiny model: what they leave behind, what they refuse, and how they fail."""

from __future__ import annotations

import copy
import csv
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import yaml
from conftest import SHIPPED, difference
from typer.testing import CliRunner

import ipissa
from ipissa.cli import app
from ipissa.cli_errors import assignments
from ipissa.errors import ConfigError, IpissaError
from ipissa.evaluate.side_by_side import cell
from ipissa.models import load_model
from ipissa.scaling import SCALE_MODES
from ipissa.train import TrainConfig, answers, train, trainer
from ipissa.train.card import _option, describe
from ipissa.train.layers import layer_changes


def test_a_run_leaves_an_adapter_its_card_and_what_it_takes_to_train_again(config: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "kind.safetensors"
    result = train(config, output)
    assert ipissa.load_adapter(output).digest == result.adapter.digest
    run = tmp_path / "kind.run"
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml",
        "history.csv",
        "layers.csv",
        "losses.png",
        "samples.md",
    ]
    assert TrainConfig.from_dict(yaml.safe_load((run / "config.yaml").read_text())) == config
    with (run / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.history) == 9  # 12 prompts, 4 pairs a step, 3 epochs
    assert float(rows[-1]["loss"]) == result.history[-1]["loss"]
    assert all(float(row["kl_positive"]) >= 0 and float(row["kl_negative"]) >= 0 for row in rows)
    assert (run / "losses.png").read_bytes().startswith(b"\x89PNG")
    with (run / "layers.csv").open() as file:
        assert [row["module"] for row in csv.DictReader(file)] == list(result.adapter.modules)
    samples = (run / "samples.md").read_text()
    assert samples.count("| α | before training | midway | after |") == 3  # held-out prompts
    assert [samples.count(f"\n| {alpha} | ") for alpha in ("-1", "+0", "+1")] == [3, 3, 3]
    assert_samples_are_what_is_written_at_their_alpha(samples, config, result)
    card = (tmp_path / "kind.md").read_text()
    assert "## Yardsticks on 3 held-out prompts" in card
    assert "--set checkpoint_every=4" in card
    y = {p["alpha"]: p["positive"] - p["negative"] for p in result.adapter.evaluation["response"]}
    alike = min(abs(y[1]), abs(y[-1])) / max(abs(y[1]), abs(y[-1])) if y[1] * y[-1] < 0 else 0.0
    assert f"over the larger: {alike:.2f}." in card


def assert_samples_are_what_is_written_at_their_alpha(samples: str, config: TrainConfig, result: Any) -> None:
    """What is in the column `after`, written again by the finished adapter and, for α = 0, by the model alone."""
    model, tokenizer = load_model(config.model, device="cpu", dtype="float32")
    steered = ipissa.attach(model, {"kind": result.adapter})
    prompt = next(iter(result.samples_after))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = {}
    for alpha in (-1, 0, 1):
        with steered.alpha(alpha):
            answer = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
        written[f"{alpha:+g}"] = tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert cell(written[f"{alpha:+g}"]) in samples
    assert result.samples_after[prompt] == written
    assert len(set(written.values())) == 3, "all poles write alike, so nothing was compared"


@pytest.mark.parametrize(
    ("gains", "where"),
    [((0.7, 0.6), "at both poles"), ((0.7, 0.59), "at the positive pole only"), ((0.1, -0.2), "at neither pole")],
)
def test_a_card_says_where_an_adapter_reaches_what_is_asked_of_one(gains: tuple[float, float], where: str) -> None:
    adapter = ipissa.load_adapter(SHIPPED[0])
    measured = copy.deepcopy(adapter.evaluation)
    for pole, gain in zip(("positive", "negative"), gains, strict=True):
        measured["yardsticks"][pole]["trait_gain"]["value"] = gain
    assert f"is reached {where} of these prompts;" in describe(replace(adapter, evaluation=measured))


def deaf(path: str, folder: Path) -> Path:
    """The model without attention: it goes on from its last token alone, whatever it is told before."""
    model, tokenizer = load_model(path, device="cpu")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"lr": 1e30}, r"at step \d+; use a lower --lr than 1e\+30|not finite after the last step; use a lower --lr"),
        (
            {"model": "deaf"},
            r"this model says nearly what it says untold \(0\.0000 nats per token\); choose stronger wor",
        ),
        ({"objective": "contrastive", "suffixes": "no/such.txt"}, "no/such.txt"),
    ],
    ids=["not finite", "nothing elicited", "suffixes"],
)
def test_what_fails_ends_with_a_sentence_and_no_adapter(
    wrong: dict[str, Any], says: str, config: TrainConfig, tmp_path: Path
) -> None:
    if "model" in wrong:
        wrong = {"model": str(deaf(config.model, tmp_path / "deaf"))}
    settings = tmp_path / "kind.yaml"
    settings.write_text(yaml.safe_dump(config.to_dict() | wrong))
    command = ["train", "--config", str(settings), "--output", str(tmp_path / "kind.safetensors")]
    ended = CliRunner().invoke(app, command)
    assert isinstance(ended.exception, IpissaError)
    assert re.search(says, str(ended.exception))
    assert not list(tmp_path.glob("kind.safetensors*"))
    assert not (tmp_path / "kind.md").exists()


@pytest.mark.parametrize(
    "template", ["Be {persona} #1", "{persona}, answer.", "Say: {persona}", "Du bist {persona}, très!"]
)
def test_the_cards_command_gives_settings_as_they_were(template: str) -> None:
    said = shlex.split(_option("template", template))
    assert said[0] == "--set"
    assert assignments("--set", said[1:]) == {"template": template}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"model": "no/such/folder"}, "cannot be"),
        ({"report_to": "no_such_tracker"}, "report_to 'no_such_tracker' cannot be used"),
        ({"trainer": {"no_such": 1}}, "do not fit transformers' TrainingArguments"),
        (
            {"objective": "contrastive", "contrastive": {"modules": "no_proj"}},
            r"Loss modules \['no_proj'\] are not all",
        ),
        ({"target_modules": ["o_proj", "dwon_proj"]}, r"target_modules 'dwon_proj' is no linear layer .* there are "),
        ({"target_modules": ["residual", "mpl"]}, "target_modules 'mpl' is no linear layer"),
        (
            {"objective": "antiparallel", "antiparallel": {"depth": 0.25}, "depth_start": 0.6},
            "compares states after block 1, which blocks from 2 on cannot move",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_sampled_and_leaves_no_run(
    wrong: dict[str, Any], says: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(answers, "sample_continuations", None)
        with pytest.raises(IpissaError, match=says):
            train(TrainConfig.from_dict(config.to_dict() | wrong), tmp_path / "kind.safetensors")
    assert not (tmp_path / "kind.run").exists()


def test_training_is_on_the_first_device(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "resolve_device", torch.device)  # as where there are two
    with pytest.raises(ConfigError, match="device 'cuda:1' cannot be trained on; set CUDA_VISIBLE_DEVICES=1 and use"):
        train(replace(config, device="cuda:1"), tmp_path / "kind.safetensors")


def test_other_objectives_and_selections_run_to_the_end(config: TrainConfig, tmp_path: Path) -> None:
    settings = {
        "objective": "guided=1,contrastive=0.01",
        "contrastive": {"depths": [0.8], "flip": "per_layer"},
        "selection": "wanda_trip",
        "strengths": (0.5, 1.0),
        "validation": 0.2,
    }
    result = train(replace(config, **settings), tmp_path / "both.safetensors")
    assert {"guided/kl", "contrastive/order", "eval_loss"} <= {name for record in result.history for name in record}


def test_an_adapter_that_learnt_the_wrong_way_round_is_mirrored(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(config, tmp_path / "straight.safetensors")
    monkeypatch.setattr(trainer, "pole_preference", lambda *args: -1.0)
    mirrored = train(config, tmp_path / "mirrored.safetensors")
    assert mirrored.adapter.evaluation["training"]["flipped"] is True
    assert difference(straight.adapter.flipped(), mirrored.adapter) == 0
    for prompt, texts in straight.samples_before.items():
        assert mirrored.samples_before[prompt] == {"-1": texts["+1"], "+0": texts["+0"], "+1": texts["-1"]}
    assert mirrored.history[-1]["kl_positive"] == straight.history[-1]["kl_negative"]


def test_an_adapter_that_learnt_the_wrong_way_round_is_turned(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, epochs=12, lr=1e-2)
    straight = train(config, tmp_path / "straight.safetensors").adapter
    learn = trainer._learn
    monkeypatch.setattr(trainer, "_learn", lambda *args: learn(*args).flipped())
    turned = train(config, tmp_path / "turned.safetensors").adapter
    assert [each.evaluation["training"]["flipped"] for each in (straight, turned)] == [False, True]
    assert difference(straight, turned) == 0


def test_runs_that_share_ask_the_base_model_once(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled, shared = [], tmp_path / "shared"
    sample = trainer.sample_continuations
    for module in (answers, trainer):
        monkeypatch.setattr(
            module, "sample_continuations", lambda *args, **how: sampled.append(how["seed"]) or sample(*args, **how)
        )
    train(config, tmp_path / "first.safetensors", shared=shared)
    other = replace(config, rank=2, objective="contrastive")
    second = train(other, tmp_path / "second.safetensors", shared=shared)
    assert sampled == [0, 1]  # to train on, and held out
    assert {path.name.rsplit("-", 1)[0] for path in shared.iterdir()} == {
        "continuations", "reach", "targets-guided", "held-out"
    }  # fmt: skip
    alone = train(other, tmp_path / "alone.safetensors")
    assert difference(second.adapter, alone.adapter) == 0
    assert second.yardsticks == alone.yardsticks
    sampled.clear()
    train(replace(config, seed=7), tmp_path / "third.safetensors", shared=shared)
    assert sampled == [7, 8]


@pytest.mark.parametrize("sides", [{}, {"rotate_u": True, "rotation": "matrix_exp"}], ids=["V", "both, matrix_exp"])
@pytest.mark.parametrize("scale_mode", SCALE_MODES)
def test_flipping_twice_gives_the_adapter_back_and_once_exchanges_the_poles(
    scale_mode: str, sides: dict[str, Any], make_adapter: Any, llama: Any
) -> None:
    adapter = make_adapter(llama, scale_mode=scale_mode, **sides)
    ids = torch.tensor([[5, 6, 7, 8]])
    for one, other, alpha in ((adapter, adapter.flipped(), 0.7), (adapter, adapter.flipped().flipped(), -0.7)):
        found = []
        for each, at in ((one, alpha), (other, -alpha if alpha > 0 else alpha)):
            steered = ipissa.attach(llama, each)
            with steered.alpha(at), torch.no_grad():
                found.append(llama(input_ids=ids).logits)
            steered.detach()
        assert (found[0] - found[1]).abs().max() < 1e-5


def test_layer_changes_equal_dense_weights(make_adapter: Any, llama: Any) -> None:
    adapter = make_adapter(llama)
    for row in layer_changes(adapter):
        factors = adapter.modules[row.module]
        up, down = (oracle.delta_weight(factors, adapter.config, alpha) for alpha in (1.0, -1.0))
        assert row.change == pytest.approx(np.linalg.norm(up) / np.linalg.norm(factors.S), rel=1e-4)
        assert row.even == pytest.approx(np.linalg.norm(up + down) / np.linalg.norm(up), rel=1e-4)
        turned = np.linalg.eigvals(oracle.rotation(factors.rotation_v.double().numpy(), 1.0, adapter.config.rotation))
        angles = np.degrees(np.abs(np.angle(turned)))
        assert row.largest_angle == pytest.approx(angles.max(), abs=1e-3)
        planes = np.sort(angles)[::-1][: 2 * (len(angles) // 2)]  # each stands twice; of an odd rank one stays
        assert row.mean_angle == pytest.approx(planes.mean(), abs=1e-3)
        scaled = oracle.scaled(factors, adapter.config, 1.0)
        assert row.scaling == pytest.approx(np.linalg.norm(scaled - factors.S.numpy()) / np.linalg.norm(factors.S))
