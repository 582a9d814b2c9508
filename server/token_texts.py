"""How one token reads on its own, as text and as bytes, for log-probabilities."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from tokenizers.decoders import ByteLevel
from transformers.convert_slow_tokenizer import bytes_to_unicode

MOST_TEXTS = 2**18  # of tokens, kept because a large answer tells a million and decoding one takes 10 µs
BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@lru_cache(maxsize=MOST_TEXTS)
def token_text(tokenizer: Any, token_id: int) -> str:
    """A token's text as it is amid others; U+FFFD for bytes that are no character.

    Tokenizers that mark words by the space before them drop that space from the first token they decode, so a token
    is read after itself: its text is what the second one adds.
    """
    alone, twice = tokenizer.decode([token_id]), tokenizer.decode([token_id, token_id])
    return twice[len(alone) :] if twice.startswith(alone) else alone


@lru_cache(maxsize=MOST_TEXTS)
def token_bytes(tokenizer: Any, token_id: int) -> tuple[int, ...]:
    """A token's own bytes, which of several tokens make one character together."""
    token = tokenizer.convert_ids_to_tokens(token_id) or ""
    if byte := BYTE_TOKEN.fullmatch(token):
        return (int(byte[1], 16),)
    if isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel) and set(token) <= BYTE_OF_CHARACTER.keys():
        return tuple(BYTE_OF_CHARACTER[character] for character in token)
    return tuple(token_text(tokenizer, token_id).encode())
