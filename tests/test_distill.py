"""Persona distillation against hand computation: its loss, its targets, its texts, and the prompts held back."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from conftest import tiny_model

from ipissa.adapter import InnerPissaConfig
from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation, Sampling, sample_continuations
from ipissa.data.personas import Trait
from ipissa.errors import ConfigError
from ipissa.train.fit import hold_back
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
