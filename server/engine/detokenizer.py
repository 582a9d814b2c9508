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
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._stream = DecodeStream(ids=self._ids, skip_special_tokens=True)
        context = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        self._prompt_length = len(context)
        # After what may be an unfinished character the stream starts over and repeats the context.
        self._repeated = len(context) if context.endswith(UNFINISHED) else 0
        self._stop = stop
        self._held = ""
        self._decoded = 0  # characters that left the stream so far

    def push(self, token_id: int) -> tuple[str, bool]:
        """(text that became final, whether a stop string was reached) after one more token."""
        self._ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id) or ""
        if text and self._repeated:
            text, self._repeated = text[self._repeated :], 0
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
