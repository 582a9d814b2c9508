"""Personas, prompts, and the chats that they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ipissa.data.chat import chat_text
from ipissa.data.personas import Trait
from ipissa.data.prompts import load_evaluation_prompts, load_prompts
from ipissa.errors import ConfigError
from ipissa.train import TrainConfig

TRAIT = Trait.from_words("kind", "angry")


def test_a_template_of_ones_own_is_the_line_the_model_is_told() -> None:
    trait = TrainConfig("kind", "angry", template="You speak as {persona} poet.").trait()
    assert trait.messages("Why?", -1)[1]["content"] == "You speak as an angry poet. Why?"
    assert trait.messages("Why?", 0)[0]["content"] == "You speak as a poet."


def test_words_get_the_article_they_need() -> None:
    pairs = {
        "honest": "an honest",
        "kind": "a kind",
        "unkind": "an unkind",
        "unique": "a unique",
        "unimportant": "an unimportant",
        "euphoric": "a euphoric",
        "a very calm": "a very calm",
        "the last": "the last",
    }
    for words, phrase in pairs.items():
        assert Trait.from_words(words, "other").positive == phrase
    with pytest.raises(ConfigError, match="two opposite words"):
        Trait.from_words("kind", " kind ")
    with pytest.raises(ConfigError, match="negative is empty"):
        Trait.from_words("kind", "")


def test_the_persona_line_stands_in_the_system_turn_and_before_the_text() -> None:
    line = "Pretend you're an angry person."
    assert TRAIT.messages("Hi.", -1) == [
        {"role": "system", "content": line},
        {"role": "user", "content": f"{line} Hi."},
    ]
    assert TRAIT.messages("Hi.", 0)[0]["content"] == "Pretend you're a person."
    assert TRAIT.messages("Hi.", None) == [{"role": "user", "content": "Hi."}]


def test_bundled_prompts_are_split_by_position_and_do_not_overlap() -> None:
    training, held_out = load_prompts()
    assert (len(training), len(held_out)) == (360, 120)
    assert not set(training) & set(held_out)
    assert load_prompts()[1] == held_out


def test_an_evaluation_measures_on_prompts_that_nothing_was_chosen_on(tmp_path: Path) -> None:
    training, tuning, held_out = load_evaluation_prompts()
    assert (training, tuning) == load_prompts()
    assert len(held_out) == 100
    assert len({*training, *tuning, *held_out}) == 580
    own = tmp_path / "mine.txt"
    own.write_text("\n".join(f"Prompt {i}" for i in range(8)))
    training, tuning, held_out = load_evaluation_prompts(own)
    assert training == tuning
    assert held_out == ["Prompt 3", "Prompt 7"]


def test_a_prompt_that_stands_there_twice_is_on_one_side_only(tmp_path: Path) -> None:
    lines = [f"Prompt {i}" for i in range(8)]
    (tmp_path / "p.txt").write_text("\n".join([*lines[:3], "Prompt 0", *lines[3:]]))
    training, held_out = load_prompts(tmp_path / "p.txt")
    assert sorted(training + held_out) == lines
    assert held_out == ["Prompt 3", "Prompt 7"]


def test_a_users_prompt_file_replaces_the_bundled_one_and_a_short_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(f"Prompt {i}" for i in range(8)) + "\n\n")
    assert load_prompts(path)[1] == ["Prompt 3", "Prompt 7"]
    path.write_text("one\n")
    with pytest.raises(ConfigError, match="holds 1 prompts"):
        load_prompts(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts(tmp_path / "missing.txt")


def test_models_that_can_think_are_asked_to_answer_at_once(tokenizer: Any) -> None:
    class Thinking:
        chat_template = "{{ messages[0].content }}{% if enable_thinking is false %}<think></think>{% endif %}"

        def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
            return tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **kwargs)

    assert chat_text(Thinking(), [{"role": "user", "content": "U"}]) == "U<think></think>"


def test_templates_without_a_system_role_get_the_system_text_in_the_first_user_turn(tokenizer: Any) -> None:
    class NoSystem:
        chat_template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"  # noqa: E501

        def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
            return tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **kwargs)

    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert chat_text(NoSystem(), messages) == "<user>S\n\nU"
