"""The settings of a training run: from presets, files and the command line, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from ipissa.cli import app
from ipissa.cli_errors import run_cli
from ipissa.errors import ConfigError
from ipissa.files import checked_output
from ipissa.train import TrainConfig, train
from ipissa.train.config import OPTIONS
from ipissa.train.presets import PRESETS, preset_settings


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


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"batch_size": 3}, "even number"),
        ({"lr": 0}, "lr 0 is not positive"),
        ({"max_prompts": 0}, "max_prompts 0 leaves nothing to train on"),
        ({"held_out": 1}, "held_out 1 leaves no interval"),
        ({"depth_start": 0.9, "depth_end": 0.5}, "depth_start"),
        ({"template": "Be kind."}, r"template 'Be kind.' must say {persona} once"),
        ({"template": "Be {persona}, {mood}."}, r"must say {persona} once, where the phrase goes, and no other name"),
        ({"top_p": 7}, "top_p 7 is not a share above 0"),
        ({"weight_decay": -1}, "weight_decay -1 is negative"),
        ({"max_grad_norm": -1.0}, "max_grad_norm -1.0 is negative; 0 is none"),
        ({"temperature": float("inf")}, "temperature inf is not a finite number"),
        ({"temperature": 1e-5}, "temperature 1e-05 draws nothing"),
        ({"max_new_tokens": 3}, "max_new_tokens 3 leaves no text to learn from; give at least 4"),
        ({"objective": "guided=1,guided=2"}, "names guided twice"),
        ({"contrastive": {"dims": 4}}, r"contrastive .* is for objective contrastive, not 'guided'"),
        ({"objective": "contrastive", "antiparallel": {"rank": 2}}, "antiparallel .* is for objective antiparallel"),
        ({"objective": "contrastive", "strengths": [0.5, 1]}, "strengths .* is for objectives guided, odd, told, not"),
        ({"objective": "antiparallel", "contexts": "both"}, "contexts both is for objectives guided, odd, told, not"),
        ({"depth_count": 0}, "depth_count 0 adapts nothing"),
        ({"suffixes": "mine.txt"}, "suffixes 'mine.txt' are for pairs of texts"),
        ({"suffixes": "mine.txt", "selection": "random"}, "with selection 'random' does not read"),
        ({"objective": "contrastive", "contrastive": {"dims": 0}}, "dims 0 leaves no direction"),
        ({"objective": "contrastive", "contrastive": {"coherence": "high"}}, "coherence 'high' is not of type float"),
        ({"max_rotation": 0.5}, "max_rotation 0.5 is for singular triples"),
        ({"trainer": {"adam_beta1": 0.5}}, "the cycle moves it"),
    ],
)
def test_unusable_settings_are_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrainConfig("kind", "angry", **bad)


def test_an_unwritable_output_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not end in"):
        checked_output(tmp_path / "adapter.bin")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        checked_output(tmp_path / "file" / "adapter.safetensors")
