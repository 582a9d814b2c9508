"""The parts of the engine that are easier to see alone: text as it comes, and α per row."""

from __future__ import annotations

from typing import Any

import pytest
from ipissa_server.engine.detokenizer import Detokenizer
from ipissa_server.engine.runner import per_adapter
from tokenizers import Tokenizer, decoders, models


def text_of(tokenizer: Any, prompt: list[int], tokens: list[int], *stop: str) -> tuple[str, list[str], bool]:
    """(whole text, its pieces, whether a stop string ended it)."""
    detokenizer, pieces = Detokenizer(tokenizer, prompt, stop), []
    for token in tokens:
        final, stopped = detokenizer.push(token)
        pieces.append(final)
        if stopped:
            return "".join(pieces), pieces, True
    pieces.append(detokenizer.flush())
    return "".join(pieces), pieces, False


@pytest.mark.parametrize("text", ["Plain words, then more.", "Ünïcödé 日本語 🙂🙂 end", " leading space", "🙂"])
def test_pieces_add_up_to_the_decoded_text_and_never_break_a_character(tokenizer: Any, text: str) -> None:
    prompt, tokens = tokenizer.encode("Before it:"), tokenizer.encode(text)
    whole, pieces, _ = text_of(tokenizer, prompt, tokens)
    assert whole == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_that_never_ends_is_shown_as_such(tokenizer: Any) -> None:
    tokens = tokenizer.encode("🙂")[:-1]
    assert text_of(tokenizer, [], tokens)[0] == tokenizer.decode(tokens)


def test_text_before_a_stop_string_is_whole_and_what_might_become_one_is_held_back(tokenizer: Any) -> None:
    tokens = tokenizer.encode("one two three four")
    assert text_of(tokenizer, [], tokens, "three")[::2] == ("one two ", True)
    assert text_of(tokenizer, [], tokens, "two t", "o three")[::2] == ("one ", True)
    assert text_of(tokenizer, [], tokens, "four score")[::2] == ("one two three four", False)


def test_a_space_that_a_tokenizer_writes_only_in_context_is_kept() -> None:
    """SentencePiece-style decoders drop the space of the first token of a text."""
    backend = Tokenizer(models.WordLevel({"▁Hello": 0, "▁world": 1}, unk_token="▁Hello"))
    backend.decoder = decoders.Metaspace()

    class Fast:
        backend_tokenizer = backend

    assert text_of(Fast(), [0], [1, 1])[0] == " world world"


def test_a_prompt_that_ends_within_a_character_is_not_repeated_in_the_answer(tokenizer: Any) -> None:
    words = tokenizer.encode(" and more")
    assert text_of(tokenizer, tokenizer.encode("The password is \ufffd"), words)[0] == " and more"
    assert text_of(tokenizer, tokenizer.encode("The password is \ufffd"), words, "password")[2] is False
    *begun, last = tokenizer.encode("My secret is 🙂")
    assert "secret" not in text_of(tokenizer, begun, [last, *words])[0]


def test_every_named_adapter_gets_one_alpha_per_row() -> None:
    steers: list[dict[str, float]] = [{"a": 1.0}, {}, {"b": -0.5, "a": 0.2}]
    assert per_adapter(steers) == {"a": [1.0, 0.0, 0.2], "b": [0.0, 0.0, -0.5]}
