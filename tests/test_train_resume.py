"""Training runs that are broken off: what they keep, and where they end when they go on."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import KillAt, KilledError, difference
from transformers import AutoModelForCausalLM

from ipissa.errors import AdapterFileError, ConfigError, TrainingError
from ipissa.models import load_model
from ipissa.train import TrainConfig, answers, train, trainer
from ipissa.train.fit import fit
from ipissa.train.run_folder import RunFolder, check_unfinished


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the next runs die after that many steps; 0 lets them live."""
    kill = KillAt(0)

    def dying(*args: Any, callbacks: Any, **settings: Any) -> Any:
        return fit(*args, **settings, callbacks=[*callbacks, kill])

    monkeypatch.setattr(trainer, "fit", dying)
    return lambda step: setattr(kill, "step", step)


def broken_off(config: TrainConfig, folder: Path, killed_at: Any) -> Path:
    """The output of a run that died after six steps, between two checkpoints."""
    output = folder / "broken.safetensors"
    killed_at(6)
    with pytest.raises(KilledError):
        train(config, output)
    return output


def test_a_killed_run_goes_on_to_the_same_adapter(config: TrainConfig, tmp_path: Path, killed_at: Any) -> None:
    unbroken = train(config, tmp_path / "unbroken.safetensors").adapter
    output = broken_off(config, tmp_path, killed_at)
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
    output = broken_off(config, tmp_path, killed_at)
    killed_at(0)
    monkeypatch.setattr(answers, "build_targets", None)  # neither asked again
    assert difference(expected, train(slower, output, resume=True).adapter) < 1e-5


def test_what_a_run_keeps_is_named_where_it_is_damaged(config: TrainConfig, tmp_path: Path, killed_at: Any) -> None:
    output = broken_off(config, tmp_path, killed_at)
    (texts,) = (tmp_path / "broken.run" / "state").glob("continuations-*.pt")
    texts.write_bytes(texts.read_bytes()[:100])
    with pytest.raises(TrainingError, match=f"{texts} cannot be read: .*; remove it, and it is computed again"):
        train(config, output, resume=True)


def test_how_often_checkpoints_are_written_is_no_reason_to_begin_anew(
    config: TrainConfig, tmp_path: Path, killed_at: Any
) -> None:
    output = broken_off(config, tmp_path, killed_at)
    learnt = sorted((tmp_path / "broken.run" / "checkpoints").glob("*"))
    RunFolder(output, replace(config, checkpoint_every=1), resume=True).begin(*load_model(config.model))
    assert sorted((tmp_path / "broken.run" / "checkpoints").glob("*")) == learnt
    RunFolder(output, replace(config, lr=0.1), resume=True).begin(*load_model(config.model))
    assert not (tmp_path / "broken.run" / "checkpoints").exists()


def test_checkpoints_of_steps_of_several_processes_are_not_gone_on_with_by_one(
    config: TrainConfig, tmp_path: Path, killed_at: Any, caplog: pytest.LogCaptureFixture
) -> None:
    output = broken_off(config, tmp_path, killed_at)
    processes = tmp_path / "broken.run" / "state" / "processes"
    assert processes.read_text() == "1"
    processes.write_text("2")
    RunFolder(output, config, resume=True).begin(*load_model(config.model))
    assert "The broken run had 2 processes and not 1: it learns anew." in caplog.text
    assert not (tmp_path / "broken.run" / "checkpoints").exists()
    assert processes.read_text() == "1"


def test_answers_are_those_of_one_arithmetic_and_one_chat_template(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(config.model)
    fast = replace(config, dtype="fast")

    def asked() -> str:
        return answers.BaseAnswers(model, tokenizer, tmp_path, fast).asked

    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    here = asked()
    assert asked() == here
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    elsewhere = asked()
    assert elsewhere != here
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
    assert asked() not in (here, elsewhere)


def test_an_adapter_that_is_complete_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "done.safetensors").write_bytes(b"an adapter")
    with pytest.raises(ConfigError, match=r"done.safetensors is complete, so there is nothing to resume"):
        check_unfinished(tmp_path / "done.safetensors")
    (tmp_path / "done.run" / "state").mkdir(parents=True)
    (tmp_path / "done.run" / "state" / "asked").touch()
    check_unfinished(tmp_path / "done.safetensors")
    check_unfinished(tmp_path / "new.safetensors")


def test_a_setting_that_is_of_no_use_costs_a_broken_run_nothing(
    config: TrainConfig, tmp_path: Path, killed_at: Any
) -> None:
    output = broken_off(config, tmp_path, killed_at)
    learnt = sorted((tmp_path / "broken.run" / "checkpoints").rglob("*"))
    with pytest.raises(ConfigError, match="do not fit transformers' TrainingArguments"):
        train(replace(config, trainer={"no_such": 1}), output, resume=True)
    assert sorted((tmp_path / "broken.run" / "checkpoints").rglob("*")) == learnt
    Path(str(config.prompts)).rename(tmp_path / "elsewhere.txt")
    moved = replace(config, prompts=str(tmp_path / "elsewhere.txt"))
    with pytest.raises(ConfigError, match=r"unfinished run that cannot be read again: The prompts file .* or remove"):
        train(moved, output)


def test_a_full_disk_at_the_end_loses_nothing(
    config: TrainConfig, tmp_path: Path, killed_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "kind.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
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
