"""What steering costs, against its definition, and how methods are brought to the same cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import random_adapter, tiny_model

from ipissa.data.chat import chat_ids
from ipissa.data.personas import Trait
from ipissa.evaluate.degradation import (
    Match,
    PlainText,
    matching_scale,
    prompt_degradation,
    sample_plain,
    text_degradation,
)
from ipissa.evaluate.dial import HookDial
from ipissa.evaluate.steerer import Steerer
from ipissa.steering import attach

TRAIT = Trait.from_words("kind", "angry")
TEXTS = [PlainText("How are you?", [50, 60, 70]), PlainText("Why?", [80, 90]), PlainText("Who is it?", [5, 6, 7, 8])]


@pytest.fixture
def steered(tokenizer: Any) -> Any:
    model = tiny_model("llama", vocab_size=len(tokenizer))
    return attach(model, random_adapter(model, suffixes=("o_proj",)))


def logprobs(model: Any, context: list[int], tokens: list[int]) -> torch.Tensor:
    """(tokens, vocab) in float64, alone and unpadded."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + tokens])).logits[0].double()
    return logits[len(context) - 1 : -1].log_softmax(-1)


def test_text_degradation_is_the_divergence_per_token_of_unsteered_answers(steered: Any, tokenizer: Any) -> None:
    total, tokens = 0.0, 0
    for text in TEXTS:
        context = chat_ids(tokenizer, [{"role": "user", "content": text.prompt}])
        base = logprobs(steered.model, context, text.tokens)
        with steered.alpha(0.3):
            other = logprobs(steered.model, context, text.tokens)
        total += float((base.exp() * (base - other)).sum())
        tokens += len(text.tokens)
    found = text_degradation(Steerer(steered), tokenizer, TEXTS, [0.3, 0.0, -0.6])
    assert found[0.3] == pytest.approx(total / tokens, rel=1e-3)
    assert found[0.0] == 0
    assert found[-0.6] > found[0.3]


def test_being_told_costs_what_the_persona_line_changes(steered: Any, tokenizer: Any) -> None:
    text = TEXTS[0]
    plain, told = (chat_ids(tokenizer, TRAIT.messages(text.prompt, pole)) for pole in (None, -1))
    base, other = (logprobs(steered.model, context, text.tokens) for context in (plain, told))
    expected = float((base.exp() * (base - other)).sum(-1).mean())
    steerer = Steerer(HookDial(steered.model), told=TRAIT)
    found = text_degradation(steerer, tokenizer, [text], [-1.0, 0.0])
    assert found[-1.0] == pytest.approx(expected, rel=1e-3)
    assert found[0.0] == pytest.approx(0, abs=1e-6)


def test_prompt_degradation_is_the_loss_of_likelihood_of_the_question(steered: Any, tokenizer: Any) -> None:
    questions = ["How are you?", "What would you do about the lost wallet?"]
    total, tokens = 0.0, 0
    for question in questions:
        ids = chat_ids(tokenizer, [{"role": "user", "content": question}], "My choice:")
        for alpha, sign in ((0.4, -1), (0.0, 1)):
            with steered.alpha(alpha):
                found = logprobs(steered.model, ids[:1], ids[1:])
            total += sign * float(found[range(len(ids) - 1), ids[1:]].sum())
        tokens += len(ids) - 1
    found = prompt_degradation(Steerer(steered), tokenizer, questions, 0.4, "My choice:")
    assert found == pytest.approx(total / tokens, rel=1e-3)
    assert prompt_degradation(Steerer(steered), tokenizer, questions, 0.0) == 0


def test_the_prompt_degradation_of_being_told_is_read_where_the_chats_are_the_same(
    steered: Any, tokenizer: Any
) -> None:
    steerer = Steerer(HookDial(steered.model), told=TRAIT)
    plain, told = (chat_ids(tokenizer, TRAIT.messages("How are you?", pole)) for pole in (None, 1))
    shared = next(k for k in range(1, len(plain)) if plain[-1 - k] != told[-1 - k])
    nats = [
        -logprobs(steered.model, ids[:-shared], ids[-shared:])[range(shared), ids[-shared:]].sum()
        for ids in (told, plain)
    ]
    expected = float(nats[0] - nats[1]) / shared
    assert prompt_degradation(steerer, tokenizer, ["How are you?"], 1.0) == pytest.approx(expected, rel=1e-3)


def test_plain_answers_are_the_same_for_one_seed(steered: Any, tokenizer: Any) -> None:
    one, two, other = (sample_plain(steered.model, tokenizer, ["Why?", "How?"], seed=seed) for seed in (0, 0, 1))
    assert one == two != other
    assert [text.prompt for text in one] == ["Why?", "How?"]


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_a_scale_is_found_at_which_degradation_is_as_wanted(power: float) -> None:
    def degradation(scale: float) -> float:
        return 4 * scale**power

    assert degradation(matching_scale(degradation, 0.03).scale) == pytest.approx(0.03, rel=0.051)
    assert degradation(matching_scale(degradation, 300.0, start=7.0).scale) == pytest.approx(300, rel=0.051)


@pytest.mark.parametrize("wanted", [0.02, 0.3, 5.0])
@pytest.mark.parametrize(
    "degradation",
    [
        lambda scale: 0.01 * scale**2 + 0.02 * max(0.0, scale - 2) ** 4,
        lambda scale: 0.01 * scale**4,
        lambda scale: 6 / (1 + math.exp(6 - 2 * scale)),
    ],
    ids=["collapse", "fourth power", "saturation"],
)
def test_a_scale_is_found_where_text_falls_apart_faster_than_the_square(
    degradation: Callable[[float], float], wanted: float
) -> None:
    found = matching_scale(degradation, wanted)
    assert found.equal
    assert degradation(found.scale) == pytest.approx(wanted, rel=0.051)


def test_a_degradation_that_no_scale_gives_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert not matching_scale(lambda scale: 0.5, 0.1).equal
    assert "No scale brings" in caplog.text


def test_nothing_to_match_leaves_the_scale() -> None:
    assert matching_scale(lambda scale: scale, 0.0) == Match(1.0, equal=False)
    assert matching_scale(lambda scale: 0.0, 0.0) == Match(1.0, equal=True)
