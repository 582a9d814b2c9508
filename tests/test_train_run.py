"""Whole training runs on a tiny model: what they leave behind, and how they survive being broken off."""

from __future__ import annotations

import copy
import csv
import errno
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import typer
import yaml
from conftest import SHIPPED, KillAt, KilledError, difference
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ipissa
from ipissa.adapter import checkpoint
from ipissa.cli import app
from ipissa.cli_errors import assignments, run_cli
from ipissa.errors import AdapterFileError, ConfigError, IpissaError, TrainingError
from ipissa.models import load_model
from ipissa.scaling import SCALE_MODES
from ipissa.train import TrainConfig, answers, train, trainer
from ipissa.train.card import _option, describe
from ipissa.train.config import OPTIONS
from ipissa.train.fit import fit
from ipissa.train.layers import layer_changes
from ipissa.train.presets import PRESETS, preset_settings
from ipissa.train.run_folder import RunFolder, check_unfinished


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the next runs die after that many steps; 0 lets them live."""
    kill = KillAt(0)

    def dying(*args: Any, callbacks: Any, **settings: Any) -> Any:
        return fit(*args, **settings, callbacks=[*callbacks, kill])

    monkeypatch.setattr(trainer, "fit", dying)
    return lambda step: setattr(kill, "step", step)


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
    card = (tmp_path / "kind.md").read_text()
    assert "## Yardsticks on 3 held-out prompts" in card
    assert "--set checkpoint_every=4" in card
    y = {p["alpha"]: p["positive"] - p["negative"] for p in result.adapter.evaluation["response"]}
    alike = min(abs(y[1]), abs(y[-1])) / max(abs(y[1]), abs(y[-1])) if y[1] * y[-1] < 0 else 0.0
    assert f"over the larger: {alike:.2f}." in card


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


def test_a_killed_run_goes_on_to_the_same_adapter(config: TrainConfig, tmp_path: Path, killed_at: Any) -> None:
    unbroken = train(config, tmp_path / "unbroken.safetensors").adapter
    output = tmp_path / "broken.safetensors"
    killed_at(6)
    with pytest.raises(KilledError):
        train(config, output)
    assert not output.exists()
    with pytest.raises(ConfigError, match="holds an unfinished run; go on with --resume"):
        train(config, output)
    with pytest.raises(ConfigError, match="The settings differ"):
        train(replace(config, max_new_tokens=5), output, resume=True)
    killed_at(0)
    resumed = train(config, output, resume=True).adapter
    assert difference(unbroken, resumed) < 1e-5
    assert "since it was resumed" in output.with_suffix(".md").read_text()
    assert "resumed" not in (tmp_path / "unbroken.md").read_text()


@pytest.mark.parametrize(
    ("learning", "kill_at"),
    [
        ({"objective": "contrastive", "contrastive": {"depths": [0.5]}}, 5),
        ({"objective": "antiparallel", "depth_end": 0.5, "suffixes": "yes"}, 7),
        ({"objective": "guided=1,contrastive=0.01", "contrastive": {"depths": [0.5]}, "batch_size": 12}, 8),
        ({"selection": "wanda_trip"}, 3),
    ],
    ids=["contrastive", "antiparallel", "sum", "selection"],
)
def test_every_objective_goes_on_to_the_same_adapter(
    learning: dict[str, Any], kill_at: int, config: TrainConfig, tmp_path: Path, killed_at: Any
) -> None:
    if "suffixes" in learning:
        (tmp_path / "suffixes.txt").write_text("\n".join(f"Well, number {i} is one of those that" for i in range(24)))
        learning = learning | {"suffixes": str(tmp_path / "suffixes.txt")}
    settings = {"trainer": {"max_steps": 9}, "checkpoint_every": 2} | learning
    config = TrainConfig.from_dict(config.to_dict() | settings)
    unbroken = train(config, tmp_path / "unbroken.safetensors").adapter
    killed_at(kill_at)
    with pytest.raises(KilledError):
        train(config, tmp_path / "broken.safetensors")
    killed_at(0)
    assert difference(unbroken, train(config, tmp_path / "broken.safetensors", resume=True).adapter) < 1e-5


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


def test_a_process_that_is_killed_goes_on_to_the_same_adapter(config: TrainConfig, tmp_path: Path) -> None:
    longer = replace(config, epochs=40)
    settings = tmp_path / "kind.yaml"
    settings.write_text(yaml.safe_dump(longer.to_dict()))
    output = tmp_path / "broken.safetensors"
    command = ["-c", "from ipissa.cli import main; main()", "train", "--config", str(settings), "--output", str(output)]
    checkpoints = tmp_path / "broken.run" / "checkpoints"
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(checkpoints.glob("checkpoint-*")):
            time.sleep(0.01)
        process.kill()  # at whatever it does: between the files of a checkpoint, or in some step after it
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    resumed = train(longer, output, resume=True).adapter
    assert difference(train(longer, tmp_path / "unbroken.safetensors").adapter, resumed) < 1e-5


def test_a_broken_run_goes_on_with_another_rate_on_the_texts_it_had(
    config: TrainConfig, tmp_path: Path, killed_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower = replace(config, lr=2e-4)
    expected = train(slower, tmp_path / "slower.safetensors").adapter
    output = tmp_path / "broken.safetensors"
    killed_at(6)
    with pytest.raises(KilledError):
        train(config, output)
    killed_at(0)
    monkeypatch.setattr(answers, "build_targets", None)  # neither asked again
    assert difference(expected, train(slower, output, resume=True).adapter) < 1e-5


def test_what_a_run_keeps_is_named_where_it_is_damaged(config: TrainConfig, tmp_path: Path, killed_at: Any) -> None:
    output = tmp_path / "broken.safetensors"
    killed_at(6)
    with pytest.raises(KilledError):
        train(config, output)
    (texts,) = (tmp_path / "broken.run" / "state").glob("continuations-*.pt")
    texts.write_bytes(texts.read_bytes()[:100])
    with pytest.raises(TrainingError, match=f"{texts} cannot be read: .*; remove it, and it is computed again"):
        train(config, output, resume=True)


def test_how_often_checkpoints_are_written_is_no_reason_to_begin_anew(
    config: TrainConfig, tmp_path: Path, killed_at: Any
) -> None:
    output = tmp_path / "broken.safetensors"
    killed_at(6)
    with pytest.raises(KilledError):
        train(config, output)
    learnt = sorted((tmp_path / "broken.run" / "checkpoints").glob("*"))
    RunFolder(output, replace(config, checkpoint_every=1), resume=True).begin(load_model(config.model)[0])
    assert sorted((tmp_path / "broken.run" / "checkpoints").glob("*")) == learnt
    RunFolder(output, replace(config, lr=0.1), resume=True).begin(load_model(config.model)[0])
    assert not (tmp_path / "broken.run" / "checkpoints").exists()


def test_an_adapter_that_is_complete_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "done.safetensors").write_bytes(b"an adapter")
    with pytest.raises(ConfigError, match=r"done.safetensors is complete, so there is nothing to resume"):
        check_unfinished(tmp_path / "done.safetensors")
    (tmp_path / "done.run" / "state").mkdir(parents=True)
    (tmp_path / "done.run" / "state" / "asked").touch()
    check_unfinished(tmp_path / "done.safetensors")
    check_unfinished(tmp_path / "new.safetensors")


@pytest.mark.parametrize(
    "template", ["Be {persona} #1", "{persona}, answer.", "Say: {persona}", "Du bist {persona}, très!"]
)
def test_the_cards_command_gives_settings_as_they_were(template: str) -> None:
    said = shlex.split(_option("template", template))
    assert said[0] == "--set"
    assert assignments("--set", said[1:]) == {"template": template}


def test_a_setting_that_is_of_no_use_costs_a_broken_run_nothing(
    config: TrainConfig, tmp_path: Path, killed_at: Any
) -> None:
    output = tmp_path / "broken.safetensors"
    killed_at(6)
    with pytest.raises(KilledError):
        train(config, output)
    learnt = sorted((tmp_path / "broken.run" / "checkpoints").rglob("*"))
    with pytest.raises(ConfigError, match="do not fit transformers' TrainingArguments"):
        train(replace(config, trainer={"no_such": 1}), output, resume=True)
    assert sorted((tmp_path / "broken.run" / "checkpoints").rglob("*")) == learnt
    Path(str(config.prompts)).rename(tmp_path / "elsewhere.txt")
    moved = replace(config, prompts=str(tmp_path / "elsewhere.txt"))
    with pytest.raises(ConfigError, match=r"unfinished run that cannot be read again: The prompts file .* or remove"):
        train(moved, output)


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


def test_a_full_disk_at_the_end_loses_nothing(
    config: TrainConfig, tmp_path: Path, killed_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "kind.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(AdapterFileError, match=r"No space left on device.*make room"):
            train(config, output)
    assert [path.name for path in tmp_path.glob("*kind*")] == ["kind.run"]
    for module, name in (
        (answers, "build_targets"),
        (answers, "sample_continuations"),
        (trainer, "sample_continuations"),
        (trainer, "select_triples"),
    ):  # neither sampled nor asked again
        monkeypatch.setattr(module, name, full)
    killed_at(1)  # nor learnt
    assert train(config, output, resume=True).adapter.digest
    assert "| midway |" in (tmp_path / "kind.run" / "samples.md").read_text()


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


@pytest.mark.parametrize("changed", ["prompts", "suffixes", "weights"])
def test_a_run_does_not_go_on_with_other_texts_or_weights(
    changed: str, config: TrainConfig, tmp_path: Path, killed_at: Any
) -> None:
    suffixes = tmp_path / "suffixes.txt"
    suffixes.write_text("I think that\nLet me tell you\nNo, and\nWell, then\n")
    assert config.prompts is not None
    folder = tmp_path / "model"
    shutil.copytree(config.model, folder)
    config = replace(config, model=str(folder), suffixes=str(suffixes), selection="wanda_trip")
    killed_at(1)
    with pytest.raises(KilledError):
        train(config, tmp_path / "kind.safetensors")
    if changed == "weights":
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.lm_head.weight *= 1.01
        model.save_pretrained(folder)
    else:
        with Path({"prompts": config.prompts, "suffixes": suffixes}[changed]).open("a") as file:
            file.write("\nAnd what of this one?")
    with pytest.raises(ConfigError, match=r"The prompts, the suffixes or the base model have changed since"):
        train(config, tmp_path / "kind.safetensors", resume=True)


def test_a_broken_run_that_learnt_nothing_gives_way_to_one_that_asks_something_else(
    config: TrainConfig, tmp_path: Path, killed_at: Any
) -> None:
    output, other = tmp_path / "kind.safetensors", replace(config, max_new_tokens=5)
    expected = train(other, tmp_path / "other.safetensors").adapter
    killed_at(1)
    with pytest.raises(KilledError):
        train(config, output)
    killed_at(0)
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        train(config, output)
    texts = sorted((tmp_path / "kind.run" / "state").iterdir())
    with pytest.raises(ConfigError, match="do not fit transformers' TrainingArguments"):
        train(replace(other, trainer={"no_such": 1}), output)
    assert sorted((tmp_path / "kind.run" / "state").iterdir()) == texts  # kept until the new settings are of use
    assert difference(expected, train(other, output).adapter) == 0


def test_checkpoints_outlive_another_spelling_of_a_file_or_another_tracker(
    config: TrainConfig, tmp_path: Path, killed_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "kind.safetensors"
    killed_at(6)
    with pytest.raises(KilledError):
        train(config, output)
    killed_at(4)  # a step that is not made again: the checkpoint is of step 4
    assert config.prompts is not None
    monkeypatch.chdir(Path(config.prompts).parent)
    train(replace(config, prompts=Path(config.prompts).name, report_to="all"), output, resume=True)


def test_every_preset_makes_a_config() -> None:
    for name in PRESETS:
        TrainConfig.from_dict({"positive": "kind", "negative": "angry"} | preset_settings(name))
    with pytest.raises(ConfigError, match="preset 'huge' is unknown"):
        preset_settings("huge")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batchsize": 8}, "setting 'batchsize' is unknown"),
        ({"epochs": "many"}, "epochs 'many' is not of type float"),
        ({"rank": 2.5}, "rank 2.5 is not of type int"),
        ({"rotate_u": "yes"}, "rotate_u 'yes' is not of type bool"),
        ({"positive": None}, "positive"),
        ({"positive": False}, "positive False is not text; put it in quotes"),
        ({"positive": ["kind", "loving"]}, r"positive \['kind', 'loving'\] is not text; put it in quotes"),
        ({"max_prompts": float("inf")}, "max_prompts inf is not of type int"),
        (
            {"objective": "antiparallel", "antiparallel": {"teacher_top_k": 0}},
            "teacher_top_k 0 leaves the barrier nothing",
        ),
        ({"objective": "antiparallel", "antiparallel": {"barrier": -1}}, "barrier -1.0 is negative or not finite"),
        ({"objective": "contrastive", "contrastive": {"coherence": float("nan")}}, "coherence nan is negative or not"),
        ({"trainer": {"gradient_checkpointing": True}}, "blocks would be computed again at another α"),
        ({"contrastive": {"losss": "raw"}}, "contrastive setting 'losss' is unknown"),
        ({"strengths": [0.5], "objective": "told"}, "strengths other than 1"),
        ({"rank": 1}, "a rotation needs a plane"),
        ({"clamp": "angels"}, "clamp 'angels' is unknown"),
        ({"objective": "contrastive", "contrastive": {"side": "W"}}, "side 'W' is unknown"),
        ({"trainer": {"learning_rate": 1}}, "trainer setting 'learning_rate' is the trainer's own; set lr"),
    ],
)
def test_settings_of_a_wrong_name_or_type_are_refused(given: dict[str, Any], says: str) -> None:
    values = {"positive": "kind", "negative": "angry"} | given
    with pytest.raises(ConfigError, match=says):
        TrainConfig.from_dict(values)


def test_plain_values_become_the_fields_types_and_come_back() -> None:
    config = TrainConfig.from_dict({"positive": "kind", "negative": "angry", "lr": "1e-3", "strengths": [0.5, 1]})
    assert (config.lr, config.strengths) == (1e-3, (0.5, 1.0))
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_the_command_line_puts_options_over_the_file_and_the_file_over_the_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainConfig] = []

    def training(config: TrainConfig, output: Path, *, resume: bool, shared: Path | None) -> None:
        seen.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr("ipissa.cli.run_training", training)
    (tmp_path / "run.yaml").write_text("positive: kind\nnegative: angry\nepochs: 7\nrank: 8\n")
    arguments = ["train", "--output", "a.safetensors", "--config", str(tmp_path / "run.yaml")]
    arguments += ["--quick", "--preset", "qwen-4b-24gb"]  # how much, over which model
    CliRunner().invoke(app, [*arguments, "--rank", "16", "--set", "rotation=matrix_exp", "--set", "strengths=[0.5, 1]"])
    (config,) = seen
    assert (config.max_prompts, config.epochs, config.rank) == (PRESETS["quick"]["max_prompts"], 7, 16)
    assert (config.rotation, config.strengths) == ("matrix_exp", (0.5, 1.0))
    assert (config.model, config.lr) == ("Qwen/Qwen3-4B-Instruct-2507", PRESETS["quick"]["lr"])


def test_an_adapter_that_does_not_work_ends_the_command_with_a_status_of_its_own(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = train(config, tmp_path / "kind.safetensors")
    arguments = ["train", "--positive", "kind", "--negative", "angry", "--output", str(tmp_path / "kind.safetensors")]
    for said, status in ((["It only breaks text."], 3), ([], 0)):
        monkeypatch.setattr(type(made), "shortcomings", lambda self, said=said: said)
        monkeypatch.setattr("ipissa.cli.run_training", lambda *args, **settings: made)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == status
        assert result.stderr == "".join(f"Warning: {sentence}\n" for sentence in said)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
            "Tried to allocate 2 GiB. Use a",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "9 bytes. Use a smaller"),
    ],
)
def test_memory_that_is_full_gets_a_sentence(error: Exception, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = typer.Typer()

    @command.command()
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit):
        run_cli(command, [])
    assert says in capsys.readouterr().err


def test_a_setting_that_is_no_yaml_gets_a_sentence() -> None:
    arguments = ["train", "--positive", "a", "--negative", "b", "--output", "a.safetensors"]
    with pytest.raises(ConfigError, match=r"--set 'contrastive=\{loss: raw' has a value that is no YAML"):
        CliRunner().invoke(app, [*arguments, "--set", "contrastive={loss: raw"], catch_exceptions=False)


def test_every_option_of_the_command_line_is_a_setting() -> None:
    (command,) = [c for c in app.registered_commands if c.callback is not None and c.callback.__name__ == "train"]
    assert command.callback is not None
    parameters = set(command.callback.__annotations__)
    assert set(OPTIONS) <= parameters
    assert set(OPTIONS) <= set(TrainConfig.__dataclass_fields__)
    assert parameters - set(OPTIONS) == {"output", "config", "preset", "set", "quick", "resume", "shared", "return"}


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
        assert row.largest_angle == pytest.approx(np.degrees(np.abs(np.angle(turned)).max()), abs=1e-3)
