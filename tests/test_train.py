"""Distillation against hand computation, and a whole run on a tiny model."""

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
from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation, Sampling, sample_continuations
from ipissa.data.personas import Trait
from ipissa.errors import ConfigError, TrainingError
from ipissa.evaluate.baselines.tuners import TUNERS, lora_like
from ipissa.files import checked_output
from ipissa.train import TrainConfig
from ipissa.train.fit import CHECKPOINTS, FITTED, History, fit, hold_back, newest_checkpoint
from ipissa.train.objectives.base import WeightedSum
from ipissa.train.objectives.distill import Distillation, Target, build_targets, distillation_loss, pole_weights

TRAIT = Trait.from_words("kind", "angry")


def loss_against(q: list[float], k: int, student: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """The loss of one row against the k likeliest probabilities of q, at its first token."""
    top = torch.tensor([[q]]).log().topk(k, dim=-1)
    pad = (0, 0, 0, student.shape[1] - 1)
    ids, logprobs = (
        torch.nn.functional.pad(top.indices, pad),
        torch.nn.functional.pad(top.values, pad, value=-torch.inf),
    )
    return distillation_loss(student, ids, logprobs, torch.ones(1, 1).bool() if mask is None else mask).item()


def test_the_loss_is_the_kl_divergence_when_all_probabilities_are_kept() -> None:
    """q = (1/2, 1/4, 1/4), p = (1/4, 1/4, 1/2): KL = 1/2 log 2 + 0 + 1/4 log 1/2 = 1/4 log 2."""
    student = torch.tensor([[[0.25, 0.25, 0.5]]]).log()
    assert loss_against([0.5, 0.25, 0.25], 3, student) == pytest.approx(0.25 * math.log(2), abs=1e-6)


def test_the_tail_counts_as_one_class() -> None:
    """Top-1 of q = (1/2, ...) against p = (1/4, ...): 1/2 log 2 + 1/2 log (1/2 / 3/4)."""
    student = torch.tensor([[[0.25, 0.25, 0.5]]]).log()
    found = loss_against([0.5, 0.25, 0.25], 1, student)
    assert found == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)


def test_the_loss_is_zero_for_a_perfect_student_and_padding_is_ignored() -> None:
    q = [0.7, 0.2, 0.1]
    student = torch.tensor([[q, [1 / 3] * 3]]).log()  # two positions, the target has one
    mask = torch.tensor([[True, False]])
    assert loss_against(q, 2, student, mask) == pytest.approx(0, abs=1e-6)


def test_targets_are_the_context_plus_the_trait_part_of_the_persona(tokenizer: Any) -> None:
    """Brute force over the whole vocabulary, one context at a time, without padding."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    continuation = Continuation("How are you?", -1, [345, 678, 910])

    def brute(pole: int | None) -> torch.Tensor:
        context = chat_ids(tokenizer, TRAIT.messages(continuation.prompt, pole))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + continuation.tokens])).logits[0]
        return logits[len(context) - 1 : -1].log_softmax(-1)

    targets = build_targets(model, tokenizer, TRAIT, [continuation], top_k=len(tokenizer), contexts="both")
    plain, neutral = brute(None), brute(0)
    for target, base in zip(targets, (plain, neutral), strict=True):
        expected = (base + brute(-1) - neutral).log_softmax(-1)
        found = torch.zeros_like(expected).scatter(-1, target.top_ids.long(), target.top_logprobs.float())
        assert target.pole == -1
        assert target.untrained == pytest.approx(float((expected.exp() * (expected - base)).sum(-1).mean()), abs=1e-4)
        assert (found.exp() - expected.exp()).abs().max() < 1e-3  # kept as float16
    assert (targets[1].top_logprobs.float() - brute(-1).sort(descending=True).values).abs().max() < 2e-2


def test_the_weaker_pole_counts_more_by_the_square_root_of_the_ratio() -> None:
    def target(pole: int, untrained: float) -> Target:
        return Target("Who?", pole, [0], [0], torch.zeros(1, 1).int(), torch.zeros(1, 1), untrained)

    weights = pole_weights([target(1, 0.01), target(1, 0.03), target(-1, 0.08)])
    assert weights[1] / weights[-1] == pytest.approx(2)  # sqrt(0.08 / 0.02)
    assert weights[1] + weights[-1] == pytest.approx(2)


def test_examples_pair_the_poles_and_leave_no_row_out() -> None:
    objective = Distillation([row(1, i) for i in range(5)] + [row(-1, i) for i in range(3)], pad_id=0)
    examples = objective.examples(objective.prompts)
    assert [(p.context[0], n.context[0]) for p, n in examples] == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1)]
    batch = objective.collate(examples[:2])
    assert batch["alpha"].tolist() == [1, -1, 1, -1]


def row(pole: int, prompt: int) -> Target:
    """A row whose context is the number of its prompt."""
    return Target(f"Prompt {prompt}", pole, [prompt], [0], torch.zeros(1, 1).int(), torch.zeros(1, 1), 0.1)


def test_no_prompt_is_both_learnt_and_validated_with() -> None:
    rows = [row(pole, i) for i in range(8) for pole in (1, -1, -1)]
    both = WeightedSum({"a": (1.0, Distillation(rows, pad_id=0)), "b": (1.0, Distillation(rows[::-1], pad_id=0))})
    learnt, validated = hold_back(both, 0.25, seed=0)
    prompts = [
        {target.prompt for example in side for pair in example.values() for target in pair}
        for side in (learnt, validated)
    ]
    assert [len(side) for side in prompts] == [6, 2]
    assert not prompts[0] & prompts[1]
    # A prompt with one pole's text only cannot validate, and is learnt from.
    mostly = Distillation([row(1, 0), *(row(pole, i) for i in (1, 2) for pole in (1, -1))], pad_id=0)
    _, validated = hold_back(mostly, 0.3, seed=0)
    assert {target.prompt for pair in validated for target in pair} <= {"Prompt 1", "Prompt 2"}
    one_pole = Distillation([row(1, 0), row(-1, 1), row(1, 2)], pad_id=0)
    with pytest.raises(ConfigError, match=r"validation 0.3 cannot be had: of 3 prompts 0 have all"):
        hold_back(one_pole, 0.3, seed=0)


def test_prompts_that_validate_are_of_either_context() -> None:
    both = Distillation([row(pole, i) for i in range(80) for pole in (1, -1)], pad_id=0)
    held = [hold_back(both, 0.25, seed=seed)[1] for seed in (0, 0, 1)]
    numbers = [{target.context[0] for pair in each for target in pair} for each in held]
    assert numbers[0] == numbers[1] != numbers[2]
    for drawn in numbers:  # contexts alternate along the prompts
        assert len(drawn) == 20
        assert 4 <= sum(number % 2 for number in drawn) <= 16


def test_guided_targets_at_other_strengths_scale_the_trait_part_and_told_ones_are_the_teacher(tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=len(tokenizer))
    continuation = Continuation("How are you?", 1, [345, 678, 910])

    def dense(pole: int | None) -> torch.Tensor:
        context = chat_ids(tokenizer, TRAIT.messages(continuation.prompt, pole))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + continuation.tokens])).logits[0]
        return logits[len(context) - 1 : -1].log_softmax(-1)

    def built(**settings: Any) -> list[Target]:
        return build_targets(model, tokenizer, TRAIT, [continuation], top_k=len(tokenizer), contexts="both", **settings)

    def probabilities(target: Target) -> torch.Tensor:
        found = torch.zeros(3, len(tokenizer))
        return found.scatter(-1, target.top_ids.long(), target.top_logprobs.float().exp())

    for target, k in zip(built(strengths=[0.5]), (None, 0), strict=True):
        expected = (dense(k) + 0.5 * (dense(1) - dense(0))).softmax(-1)
        assert target.alpha == 0.5
        assert (probabilities(target) - expected).abs().max() < 1e-3
    for target, k in zip(built(kind="odd"), (None, 0), strict=True):
        expected = (dense(k) + (dense(1) - dense(-1)) / 2).softmax(-1)
        assert (probabilities(target) - expected).abs().max() < 1e-3
    for target in built(kind="told"):
        assert (probabilities(target) - dense(1).exp()).abs().max() < 1e-3


def test_the_student_reads_texts_of_either_pole_plainly_and_as_nobody_in_particular_by_turns(tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=len(tokenizer))
    texts = [Continuation(f"Question {i}?", pole, [100 + i, 200 + pole]) for i in range(4) for pole in (1, -1)]

    def contexts(name: str) -> list[tuple[int, list[int]]]:
        return sorted(
            (t.tokens[0], t.context) for t in build_targets(model, tokenizer, TRAIT, texts, top_k=8, contexts=name)
        )

    def expected(*by_turns: int | None) -> list[tuple[int, list[int]]]:
        personas = [by_turns[i % len(by_turns)] for i in range(4)]
        return sorted(
            (100 + i, chat_ids(tokenizer, TRAIT.messages(f"Question {i}?", persona)))
            for i, persona in enumerate(personas)
            for _ in range(2)
        )

    assert contexts("alternate") == expected(None, 0)
    assert contexts("plain") == expected(None)
    assert contexts("neutral") == expected(0)
    assert contexts("both") == sorted(expected(None) + expected(0))


def test_sampled_continuations_are_reproducible_and_leave_the_global_random_state(tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=len(tokenizer))
    state = torch.random.get_rng_state()
    settings = {"per_prompt": 2, "sampling": Sampling(max_new_tokens=5), "seed": 3}
    first = sample_continuations(model, tokenizer, TRAIT, ["Hello there", "Why?"], **settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == sample_continuations(model, tokenizer, TRAIT, ["Hello there", "Why?"], **settings)
    assert [(c.prompt, c.pole) for c in first] == [(p, s) for p in ("Hello there", "Why?") for s in (1, 1, -1, -1)]


def test_a_models_own_generation_settings_do_not_mix_with_ours(tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=len(tokenizer))
    peft_model = peft.get_peft_model(
        tiny_model("llama", vocab_size=len(tokenizer)), InnerPissaConfig(r=4, target_modules=["o_proj"], init_std=0.0)
    )
    settings = {"per_prompt": 4, "sampling": Sampling.whole(max_new_tokens=6), "seed": 3}
    plain = sample_continuations(model, tokenizer, TRAIT, ["Hello there"], **settings)
    for each in (model, peft_model):
        for name, value in (("temperature", 1e-3), ("top_p", 0.1), ("repetition_penalty", 9.0)):
            setattr(each.generation_config, name, value)
        own = each.generation_config
        assert sample_continuations(each, tokenizer, TRAIT, ["Hello there"], **settings) == plain
        assert each.generation_config is own
    assert peft_model.get_base_model().generation_config.top_p != 1.0


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
