"""Turn one row's tokens into text as they come, stopping at stop strings; on the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from .base import Delta, Row, SamplingParams, TokenLogprob, TokenOut

CONTEXT_TOKENS = 8
UNFINISHED = "\ufffd"  # what bytes that are no character decode to


class TextOut:
    """From the tokens of one row to what its client is told."""

    def __init__(self, tokenizer: Any, row: Row, sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._row = row
        self._echo = sampling.echo
        self._detokenizer = Detokenizer(tokenizer, row.prompt_ids, sampling.stop)
        self.ended = False

    def deltas(self, output: TokenOut) -> list[Delta]:
        """What a token adds: first the prompt, if it is echoed, then its text; nothing after the end."""
        if self.ended:
            return []
        found = []
        if self._echo:
            self._echo = False
            text = self._tokenizer.decode(self._row.prompt_ids, skip_special_tokens=True)
            first = TokenLogprob(self._row.prompt_ids[0], None, [])
            logprobs = [] if output.prompt_logprobs is None else [first, *output.prompt_logprobs]
            found.append(Delta(output.row, text, 0, logprobs, None if output.token_id is not None else "length"))
        if output.token_id is not None:
            found.append(self._token(output, output.token_id))
        self.ended = found[-1].finish_reason is not None
        return found

    def _token(self, output: TokenOut, token_id: int) -> Delta:
        logprobs = [] if output.logprob is None else [output.logprob]
        if output.finish_reason == "stop":  # an end token, which has no text
            return Delta(output.row, self._detokenizer.flush(), 1, logprobs, "stop")
        final, stopped = self._detokenizer.push(token_id)
        if stopped:
            return Delta(output.row, final, 1, logprobs, "stop")
        if output.finish_reason:
            return Delta(output.row, final + self._detokenizer.flush(), 1, logprobs, output.finish_reason)
        return Delta(output.row, final, 1, logprobs)


class Detokenizer:
    """Text of one row. Bytes of an unfinished character, or what may become a stop string, are held back."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        # Some tokenizers write a token's leading space only after other text, so the text starts in context.
        self._begin_after(list(prompt_ids[-CONTEXT_TOKENS:]))
        self._stop = stop
        self._held = ""

    def push(self, token_id: int) -> tuple[str, bool]:
        """(text that became final, whether a stop string was reached) after one more token."""
        self._held += self._text_of(token_id)
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
        return self._held + self._untold()

    def _begin_after(self, ids: list[int]) -> None:
        self._told_ids = ids
        self._new_ids: list[int] = []  # that have no text yet
        self._stream = DecodeStream(ids=ids, skip_special_tokens=True)
        # After what may be an unfinished character the stream begins with the text before it.
        self._repeats = self._decode(ids).endswith(UNFINISHED)

    def _text_of(self, token_id: int) -> str:
        """What leaves the stream with one more token."""
        self._new_ids.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # all that it raises: what it has told reads otherwise with the new tokens
            broken = True
        else:
            broken = bool(text) and self._repeats
        if broken:
            text = self._untold()
            self._begin_after(self._new_ids)
        elif text:
            self._told_ids, self._new_ids = self._new_ids, []
        return text

    def _untold(self) -> str:
        """The text of the new tokens."""
        told, whole = self._decode(self._told_ids), self._decode(self._told_ids + self._new_ids)
        if whole.startswith(told):
            return whole[len(told) :]
        # Where bytes are tokens, a stray one takes the characters just before it along. Those stay told.
        return self._decode(self._new_ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
