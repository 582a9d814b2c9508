"""Fitting on a tiny model: what is learnt, resumed, stopped early, and how it fails."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import KillAt, KilledError, tiny_model

from ipissa.adapter import InnerPissaConfig
from ipissa.adapter.dial import add_dial
from ipissa.adapter.layer import InnerPissaLayer
from ipissa.data.continuations import Sampling, sample_continuations
from ipissa.data.personas import Trait
from ipissa.errors import TrainingError
from ipissa.evaluate.baselines.tuners import TUNERS, lora_like
from ipissa.train import TrainConfig
from ipissa.train.fit import CHECKPOINTS, FITTED, History, fit, newest_checkpoint
from ipissa.train.objectives.base import WeightedSum
from ipissa.train.objectives.distill import Distillation, Target, build_targets

TRAIT = Trait.from_words("kind", "angry")


@pytest.fixture(scope="module")
def targets(tokenizer: Any) -> list[Target]:
    model = tiny_model("llama", vocab_size=len(tokenizer))
    continuations = sample_continuations(
        model, tokenizer, TRAIT, ["Hello there"], per_prompt=4, sampling=Sampling(max_new_tokens=6), seed=0
    )
    return build_targets(model, tokenizer, TRAIT, continuations, top_k=64, contexts="both")


def untrained(tokenizer: Any) -> Any:
    """The same fresh adapter on the same tiny model, every time."""
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=len(tokenizer)).requires_grad_(False)
    return peft.get_peft_model(model, InnerPissaConfig(r=16, target_modules=["o_proj", "down_proj", "v_proj"]))


def parameters(peft_model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in peft_model.parameters() if p.requires_grad]


def distill(tokenizer: Any, targets: list[Target]) -> Distillation:
    return Distillation(targets, pad_id=tokenizer.pad_token_id)


SETTINGS = {"epochs": 40, "batch_size": 8, "lr": 1e-2}


def test_fitting_lowers_the_loss_at_both_poles(tokenizer: Any, targets: list[Target], tmp_path: Path) -> None:
    config = TrainConfig("kind", "angry", **SETTINGS)
    history = fit(untrained(tokenizer), distill(tokenizer, targets), config, tmp_path)
    assert len(history) == 80  # 8 pairs, 4 a step
    for key in ("kl_positive", "kl_negative"):
        start, end = (sum(record[key] for record in part) for part in (history[:5], history[-5:]))
        assert end < 0.8 * start


@pytest.mark.parametrize("kind", TUNERS)
def test_lora_and_dora_train_under_the_same_objective(
    kind: str, tokenizer: Any, targets: list[Target], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=len(tokenizer)).requires_grad_(False)
    config = TrainConfig("kind", "angry", rank=4, **SETTINGS | {"epochs": 20})
    tuned = peft.get_peft_model(model, lora_like(config.adapter_config(4), dora=kind == "dora"))
    add_dial(tuned)
    history = fit(tuned, distill(tokenizer, targets), config, tmp_path)
    for key in ("kl_positive", "kl_negative"):
        start, end = (sum(record[key] for record in part) for part in (history[:5], history[-5:]))
        assert end < 0.9 * start


@pytest.mark.parametrize("kill_at", [3, 7, 13])
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    kill_at: int, tokenizer: Any, targets: list[Target], tmp_path: Path
) -> None:
    config = TrainConfig("kind", "angry", **SETTINGS | {"epochs": 8}, checkpoint_every=4)
    objective = distill(tokenizer, targets)
    unbroken = untrained(tokenizer)
    history = fit(unbroken, objective, config, tmp_path / "unbroken")

    with pytest.raises(KilledError):
        fit(untrained(tokenizer), objective, config, tmp_path / "broken", callbacks=[KillAt(kill_at)])
    resumed = untrained(tokenizer)
    torch.manual_seed(99)  # a new process has another random state
    again = fit(resumed, objective, config, tmp_path / "broken", resume=True)

    assert [record["step"] for record in again] == list(range(1, 17)) == [record["step"] for record in history]
    for one, other in zip(parameters(unbroken), parameters(resumed), strict=True):
        assert (one - other).abs().max() < 1e-5
    assert any(
        (a - b).abs().max() > 1e-3 for a, b in zip(parameters(unbroken), parameters(untrained(tokenizer)), strict=True)
    )


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(tmp_path: Path) -> None:
    for step, whole in ((4, True), (12, False), (8, True)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "objective.json").write_text("{}")
    assert newest_checkpoint(tmp_path).name == "checkpoint-8"


def test_accumulated_batches_give_the_step_of_one_large_batch(
    tokenizer: Any, targets: list[Target], tmp_path: Path
) -> None:
    found, norms = [], []
    for name, split in (("one", {"batch_size": 16}), ("four", {"batch_size": 4, "accumulation": 4})):
        peft_model = untrained(tokenizer)
        config = TrainConfig("kind", "angry", epochs=1, lr=1e-2, **split)
        history = fit(peft_model, distill(tokenizer, targets), config, tmp_path / name)
        assert len(history) == 1
        norms.append(history[0]["grad_norm"])
        found.append(parameters(peft_model))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < 1e-4
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)  # AdamW's first step does not tell a sum from a mean


class Worsening:
    """An objective whose loss rises with every step on examples it has not seen."""

    rows_per_example = 2

    def __init__(self) -> None:
        self.prompts = [f"Prompt {i}" for i in range(20)]

    def examples(self, prompts: Collection[str]) -> list[int]:
        return [i for i, prompt in enumerate(self.prompts) if prompt in prompts]

    def collate(self, examples: list[int]) -> dict[str, Any]:
        return {"held": torch.tensor(examples)}

    def loss(self, model: Any, batch: dict[str, Any], progress: float) -> tuple[torch.Tensor, dict]:
        anchor = 0 * next(p for p in model.parameters() if p.requires_grad).sum()
        return anchor + (1 - progress if model.training else 1 + progress), {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Drifting(Worsening):
    """Its weights move with every step, so that they say which step they are of."""

    def loss(self, model: Any, batch: dict[str, Any], progress: float) -> tuple[torch.Tensor, dict]:
        loss, figures = super().loss(model, batch, progress)
        return loss + sum(p.sum() for p in model.parameters() if p.requires_grad) * model.training, figures


STOPPING = {"epochs": 10, "batch_size": 4, "validation": 0.2, "patience": 2, "checkpoint_every": 5, "lr": 1e-2}


def test_training_stops_when_validation_worsens_and_keeps_the_best(tokenizer: Any, tmp_path: Path) -> None:
    def weights_after(steps: int | None) -> tuple[list[torch.Tensor], History]:
        peft_model = untrained(tokenizer)
        settings = STOPPING if steps is None else STOPPING | {"validation": 0.0}
        callbacks = [] if steps is None else [KillAt(steps)]
        objective = Drifting() if steps is None else Sixteen()
        try:
            history = fit(
                peft_model, objective, TrainConfig("kind", "angry", **settings), tmp_path / str(steps),
                callbacks=callbacks,
            )  # fmt: skip
        except KilledError:
            history = []
        return parameters(peft_model), history

    kept, history = weights_after(None)
    assert max(record["step"] for record in history) == 15  # best at 5, then twice worse, of 80 steps
    fifth, tenth = weights_after(5)[0], weights_after(10)[0]
    assert all((one - other).abs().max() < 1e-6 for one, other in zip(kept, fifth, strict=True))
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(kept, tenth, strict=True))


class Sixteen(Drifting):
    """Without the four prompts that validate, so that it makes the same steps."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = self.prompts[:16]


def test_holding_prompts_back_where_nothing_can_stop_early_is_warned_of(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(untrained(tokenizer), Drifting(), TrainConfig("kind", "angry", **STOPPING | {"epochs": 1}), tmp_path / "few")
    assert "of 8 steps validation is after every 5, and patience is 2" in caplog.text
    caplog.clear()
    fit(untrained(tokenizer), Drifting(), TrainConfig("kind", "angry", **STOPPING | {"epochs": 2}), tmp_path / "enough")
    assert "cannot happen" not in caplog.text


def test_a_resumed_run_stops_when_an_unbroken_one_does(tokenizer: Any, tmp_path: Path) -> None:
    config = TrainConfig("kind", "angry", **STOPPING)
    with pytest.raises(KilledError):
        fit(untrained(tokenizer), Drifting(), config, tmp_path, callbacks=[KillAt(13)])
    history = fit(untrained(tokenizer), Drifting(), config, tmp_path, resume=True)
    assert max(record["step"] for record in history) == 15


def test_a_run_killed_as_it_stopped_early_does_not_learn_on(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig("kind", "angry", **STOPPING)
    whole, resumed = untrained(tokenizer), untrained(tokenizer)

    def killed(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as at_the_end:
        at_the_end.setattr("ipissa.train.fit.write_whole", killed)
        with pytest.raises(KilledError):
            fit(whole, Drifting(), config, tmp_path)
    history = fit(resumed, Drifting(), config, tmp_path, resume=True)
    assert max(record["step"] for record in history) == 16  # of 80
    for one, other in zip(parameters(whole), parameters(resumed), strict=True):
        assert (one - other).abs().max() < 1e-6


def test_learning_that_is_complete_is_not_begun_again(tokenizer: Any, tmp_path: Path) -> None:
    config = TrainConfig("kind", "angry", **STOPPING)
    first, second = untrained(tokenizer), untrained(tokenizer)
    history = fit(first, Drifting(), config, tmp_path)
    for layer in second.modules():  # as by another machine's SVD
        if isinstance(layer, InnerPissaLayer):
            layer.innerpissa_U["default"] *= -1
            layer.innerpissa_V["default"] *= -1
    assert fit(second, Drifting(), config, tmp_path, resume=True, callbacks=[KillAt(1)]) == history
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_full_disk_on_the_way_says_so_and_the_run_goes_on(
    tokenizer: Any, targets: list[Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig("kind", "angry", **SETTINGS | {"epochs": 4}, checkpoint_every=4)
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda value, *args, **kwargs: save(value, "/dev/full"))
    with pytest.raises(TrainingError, match=r"A checkpoint cannot be written: .* make room, and go on with --resume"):
        fit(untrained(tokenizer), distill(tokenizer, targets), config, tmp_path)
    monkeypatch.setattr(torch, "save", save)
    assert len(fit(untrained(tokenizer), distill(tokenizer, targets), config, tmp_path, resume=True)) == 8


class Broken(Worsening):
    def loss(self, model: Any, batch: dict[str, Any], progress: float) -> tuple[torch.Tensor, dict]:
        loss, figures = super().loss(model, batch, progress)
        return loss * (math.nan if progress > 0.1 else 1), figures


def test_a_loss_that_is_not_finite_ends_training_with_what_to_do(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"The loss is nan at step \d+; use a lower --lr than 0.01"):
        fit(untrained(tokenizer), Broken(), TrainConfig("kind", "angry", **SETTINGS), tmp_path)


class BrokenGradient(Worsening):
    """Of which the loss of every step is finite, and the gradient of the last is not."""

    def loss(self, model: Any, batch: dict[str, Any], progress: float) -> tuple[torch.Tensor, dict]:
        loss, figures = super().loss(model, batch, progress)
        return (loss + 0 * (loss - loss.detach()).sqrt() if progress > 0.94 else loss), figures


def test_weights_that_are_not_finite_are_not_what_was_learnt(tokenizer: Any, tmp_path: Path) -> None:
    config = TrainConfig("kind", "angry", **SETTINGS | {"epochs": 4})  # 20 steps
    with pytest.raises(TrainingError, match=r"not finite after the last step; use a lower --lr than 0\.01"):
        fit(untrained(tokenizer), BrokenGradient(), config, tmp_path)
    assert not (tmp_path / CHECKPOINTS / FITTED).exists()


def test_a_damaged_checkpoint_is_named_and_not_called_a_full_disk(tokenizer: Any, tmp_path: Path) -> None:
    config = TrainConfig("kind", "angry", **STOPPING)
    with pytest.raises(KilledError):
        fit(untrained(tokenizer), Drifting(), config, tmp_path, callbacks=[KillAt(13)])
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    (newest / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(TrainingError, match=f"The checkpoint {newest} cannot be read: .*; remove it, and go on"):
        fit(untrained(tokenizer), Drifting(), config, tmp_path, resume=True)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "objective.json"]
)
def test_whatever_of_a_checkpoint_is_damaged_is_named(name: str, tokenizer: Any, tmp_path: Path) -> None:
    config = TrainConfig("kind", "angry", **STOPPING)
    with pytest.raises(KilledError):
        fit(untrained(tokenizer), Drifting(), config, tmp_path, callbacks=[KillAt(13)])
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    whole = (newest / name).read_bytes()
    (newest / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingError, match=f"The checkpoint {newest} cannot be read: .*; remove it, and go on"):
        fit(untrained(tokenizer), Drifting(), config, tmp_path, resume=True)


def test_the_rate_rises_to_its_peak_over_the_warmup_and_falls_to_nearly_nothing(
    tokenizer: Any, targets: list[Target], tmp_path: Path
) -> None:
    config = TrainConfig("kind", "angry", lr=1e-3, warmup=0.3, epochs=40, batch_size=8)
    history = fit(untrained(tokenizer), distill(tokenizer, targets), config, tmp_path)
    rates = [record["learning_rate"] for record in history]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1e-3, rel=1e-2)
    assert peak == pytest.approx(0.3 * len(rates), abs=2)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] < 0.05 * max(rates)
    assert rates[-1] < 1e-2 * max(rates)


def test_a_weighted_sum_adds_losses_and_names_figures(tokenizer: Any, targets: list[Target]) -> None:
    part = distill(tokenizer, targets)
    both = WeightedSum({"a": (2.0, part), "b": (0.5, distill(tokenizer, targets[::2]))})
    assert len(both.examples(both.prompts)) == len(part.examples(part.prompts))
    model = untrained(tokenizer)
    with torch.no_grad():
        loss, figures = both.loss(model, both.collate(both.examples(both.prompts)[:2]), 0.0)
        alone = [o.loss(model, o.collate(o.examples(o.prompts)[:2]), 0.0)[0] for _, o in both.parts.values()]
    assert loss.item() == pytest.approx(2 * alone[0].item() + 0.5 * alone[1].item())
    assert {"a/kl", "b/kl_negative"} <= set(figures)
