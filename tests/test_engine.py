"""The parts of the engine that are easier to see alone: text as it comes, and α per row."""

from __future__ import annotations

import random
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


WORDS = ["▁a", "b", "▁", "日"]


class ByteFallback:
    """A tokenizer as Gemma's and Llama 2's: what has no token of its own is written in bytes."""

    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(WORDS)}
    backend_tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    a = vocab["▁a"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([*"é".encode(), 0xFF, ByteFallback.a], "é\ufffd a"),
        ([*"🙂".encode(), *"🙂".encode()[:2], ByteFallback.a, ByteFallback.a], "🙂\ufffd\ufffd a a"),
        ([*"🙂".encode(), *"🙂".encode()[:2]], "🙂\ufffd\ufffd"),
        ([*"éé".encode(), ByteFallback.a], "éé a"),
    ],
)
def test_characters_stay_told_when_a_stray_byte_follows_them(written: list[int], expected: str) -> None:
    tokenizer = ByteFallback()
    assert text_of(tokenizer, [ByteFallback.a], written)[0] == expected
    assert text_of(tokenizer, [ByteFallback.a, *"é".encode()], written)[0] == expected


def test_any_bytes_and_words_add_up_to_the_characters_that_were_whole_and_a_mark_for_each_other_byte() -> None:
    rng = random.Random(0)
    characters = ["é", "日", "🙂"]

    def run_of_bytes() -> list[int]:
        """Some characters, which may be followed by bytes that are none."""
        whole = [byte for _ in range(rng.randrange(4)) for byte in rng.choice(characters).encode()]
        return whole + [rng.choice([0xFF, 0x80, 0xC3, 0xF0, 0x9F]) for _ in range(rng.choice([0, 0, 1, 3]))]

    def as_told(run: list[int]) -> str:
        ends = [end for end in range(len(run) + 1) if is_text(run[:end])]
        return bytes(run[: ends[-1]]).decode() + "\ufffd" * (len(run) - ends[-1])

    for _ in range(2000):
        tokens, expected = [], ""
        for _ in range(rng.randrange(1, 8)):
            run, word = run_of_bytes(), rng.randrange(len(WORDS))
            tokens += [*run, 256 + word]
            expected += as_told(run) + WORDS[word].replace("▁", " ")
        end = run_of_bytes()
        assert text_of(ByteFallback(), [ByteFallback.a], tokens + end)[0] == expected + as_told(end)


def is_text(run: list[int]) -> bool:
    return "\ufffd" not in bytes(run).decode(errors="replace")


def test_every_named_adapter_gets_one_alpha_per_row() -> None:
    steers: list[dict[str, float]] = [{"a": 1.0}, {}, {"b": -0.5, "a": 0.2}]
    assert per_adapter(steers) == {"a": [1.0, 0.0, 0.2], "b": [0.0, 0.0, -0.5]}
