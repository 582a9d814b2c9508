"""Steering by telling the model who to be: by the persona line itself, and in other words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import logits_of, random_adapter, tiny_model

from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation
from ipissa.data.personas import Messages, Trait
from ipissa.evaluate.baselines.engineered import EngineeredTrait
from ipissa.evaluate.dial import HookDial
from ipissa.evaluate.held_out import HeldOut
from ipissa.evaluate.yardsticks import measure_persona_prompt
from ipissa.steering import attach

TRAIT = Trait.from_words("kind", "angry")


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny_model("llama", vocab_size=len(tokenizer))


def log_likelihood(model: Any, tokenizer: Any, tokens: list[int], asked: Messages, told: Messages) -> float:
    """Of a text after the chat `asked`, expected at every token over what the model says next after `told`."""
    p, q = (
        logits_of(model, torch.tensor([context + tokens]))[0, len(context) - 1 : -1].double().log_softmax(-1)
        for context in (chat_ids(tokenizer, told), chat_ids(tokenizer, asked))
    )
    return float((p.exp() * q).sum())


def test_engineered_prompts_say_it_at_length_in_the_system_turn_only() -> None:
    trait = EngineeredTrait(**vars(TRAIT))
    system, user = trait.messages("Why?", -1)
    assert (system["role"], user) == ("system", {"role": "user", "content": "Why?"})
    assert system["content"].count("an angry person") == 2
    assert trait.messages("Why?", 0) == trait.messages("Why?", None) == [user]


def test_engineered_prompts_stand_in_front_of_the_neutral_line_where_a_dial_would_be_turned() -> None:
    trait = EngineeredTrait(**vars(TRAIT))
    system, user = trait.over_neutral().messages("Why?", -1)
    neutral = TRAIT.messages("Why?", 0)
    assert system["content"] == f"{trait.messages('Why?', -1)[0]['content']} {neutral[0]['content']}"
    assert user == neutral[1]
    assert TRAIT.over_neutral() is TRAIT  # the persona line itself is what the neutral one is another of


def test_an_engineered_prompt_is_compared_with_the_neutral_line_that_it_was_added_to(
    model: Any, tokenizer: Any
) -> None:
    engineered = EngineeredTrait(**vars(TRAIT))
    prompts, tokens = ("Who is it?", "Why?"), [11, 12, 13]
    texts = [Continuation(prompt, pole, tokens) for prompt in prompts for pole in (1, -1)]
    found = measure_persona_prompt(HookDial(model), HeldOut(tokenizer, TRAIT, texts), told_by=engineered)

    def total(who: Trait, pole: int) -> float:
        return sum(
            log_likelihood(model, tokenizer, tokens, who.messages(prompt, pole), TRAIT.messages(prompt, 1))
            for prompt in prompts
        )

    neutral = total(TRAIT, 0)
    expected = (total(engineered.over_neutral(), 1) - neutral) / (total(TRAIT, 1) - neutral)
    assert found.positive.trait_gain.value == pytest.approx(expected, abs=1e-3)


def test_the_plain_gain_of_a_persona_prompt_equals_its_definition(model: Any, tokenizer: Any) -> None:
    def logp(text: Continuation, persona: int | None) -> float:
        asked, told = (TRAIT.messages(text.prompt, p) for p in (persona, 1))
        return log_likelihood(model, tokenizer, text.tokens, asked, told)

    own = [Continuation("How are you?", 1, [11, 12, 13]), Continuation("Who is it?", 1, [14, 15])]
    others = [Continuation(text.prompt, -1, [16, 17]) for text in own]
    found = measure_persona_prompt(attach(model, random_adapter(model)), HeldOut(tokenizer, TRAIT, own + others))
    expected = sum(logp(text, 1) - logp(text, None) for text in own) / 5
    assert found.positive.plain_gain.value == pytest.approx(expected, abs=1e-4)
