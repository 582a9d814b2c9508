"""Where the tokens of a row begin in its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .engine.detokenizer import Detokenizer


class TextOffsets:
    """Offsets of one row's tokens as they come, the same however many come at a time.

    Args:
        echo: Whether the row begins with its prompt. Otherwise its text is what follows the prompt.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], *, echo: bool) -> None:
        self._detokenizer = Detokenizer(tokenizer, [] if echo else prompt_ids, ())
        self._length = 0

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """Characters before each of the next tokens; those of one character begin where it does."""
        found = []
        for token_id in token_ids:
            found.append(self._length)
            text, _ = self._detokenizer.push(token_id)
            self._length += len(text)
        return found
