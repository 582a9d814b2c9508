"""What one token reads as in log-probabilities, on the three kinds of tokenizers there are."""

from __future__ import annotations

from typing import Any

import pytest
from ipissa_server.token_texts import token_bytes, token_text
from serving import Served
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

EMOJI = "🙂"


def fast(model: Any, decoder: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Gemma's and Llama 2's."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "b": 257, "▁": 258}
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return fast(models.BPE(vocab, [], byte_fallback=True), decoders.Sequence(parts))


def test_the_space_before_a_word_is_part_of_its_token() -> None:
    words = fast(models.WordLevel({"▁Hello": 0, "▁world": 1}, unk_token="▁Hello"), decoders.Metaspace())
    assert words.decode([1]) == "world", "this tokenizer keeps the space anyway, so nothing is tested"
    assert token_text(words, 1) == " world"
    assert token_bytes(words, 1) == tuple(b" world")
    assert [token_text(byte_fallback(), token) for token in (256, 257, 258)] == [" a", "b", " "]


def test_a_byte_that_is_a_token_is_told_as_that_byte() -> None:
    tokenizer = byte_fallback()
    assert [token_bytes(tokenizer, byte) for byte in EMOJI.encode()] == [(byte,) for byte in EMOJI.encode()]
    assert token_text(tokenizer, EMOJI.encode()[0]) == "\ufffd"
    assert token_text(tokenizer, ord("x")) == "x"


@pytest.mark.parametrize("text", [EMOJI, "Héllo wörld 你好", "a\n  b\t\x00"])
def test_bytes_of_the_tokens_of_a_text_are_those_of_the_text(served: Served, text: str) -> None:
    tokenizer = served.app.state.engine.tokenizer
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert bytes(byte for token in tokens for byte in token_bytes(tokenizer, token)) == text.encode()


def test_special_tokens_are_told_by_their_names(served: Served) -> None:
    tokenizer = served.app.state.engine.tokenizer
    for token in tokenizer.all_special_ids:
        name = tokenizer.convert_ids_to_tokens(token)
        assert token_text(tokenizer, token) == name
        assert bytes(token_bytes(tokenizer, token)).decode() == name


def test_chat_tells_the_bytes_of_parts_of_a_character(served: Served) -> None:
    tokenizer = served.app.state.engine.tokenizer
    first, *_ = tokenizer.encode(EMOJI, add_special_tokens=False)
    found = served.openai.chat.completions.create(
        model="honest",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=1,
        logit_bias={str(first): 100},
        logprobs=True,
        top_logprobs=2,
    )
    (told,) = found.choices[0].logprobs.content
    assert told.token == "\ufffd"
    assert bytes(told.bytes) == bytes(token_bytes(tokenizer, first)) != "\ufffd".encode()
    assert told.top_logprobs[0].bytes is not None
