"""Turn one row's tokens into text as they come, stopping at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 8


class Detokenizer:
    """Text of one row. Bytes of an unfinished character, or what may become a stop string, are held back."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        # Some tokenizers write a token's leading space only after other text, so the text starts in context.
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._stream = DecodeStream(ids=self._ids, skip_special_tokens=True)
        self._prompt_length = len(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        self._stop = stop
        self._held = ""
        self._decoded = 0  # characters that left the stream so far

    def push(self, token_id: int) -> tuple[str, bool]:
        """(text that became final, whether a stop string was reached) after one more token."""
        self._ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._decoded += len(text)
        self._held += text
        hits = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if hits:
            final, self._held = self._held[: min(hits)], ""
            return final, True
        keep = self._possible_stop()
        final = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return final, False

    def flush(self) -> str:
        """What is left when the row ends: held text, and the bytes of a character that never ended."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._held + whole[self._prompt_length + self._decoded :]

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
