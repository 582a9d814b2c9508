"""One sequence while it runs, and the request it belongs to."""

from __future__ import annotations

import asyncio
from array import array
from hashlib import blake2b
from itertools import count

import torch
from torch import Tensor

from .base import GenerationRequest, Row, SamplingParams, TokenLogprob, TokenOut

_arrivals = count()


class Job:
    """A generation request between the event loop, which waits for tokens, and the worker, which makes them."""

    def __init__(self, request: GenerationRequest, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.digests = request.digests
        self.outputs: asyncio.Queue[list[TokenOut] | Exception] = asyncio.Queue()
        self.sequences = [Sequence(self, index, row, request.sampling) for index, row in enumerate(request.rows)]
        self._bias = request.sampling.logit_bias
        self._bias_tensors: tuple[Tensor, Tensor] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for any of its sequences."""
        return all(sequence.ended for sequence in self.sequences)

    def logit_bias(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids and what their logits get added, (tokens,) each; made at the first step, for all rows and steps."""
        if self._bias_tensors is None:
            ids, values = torch.tensor(list(self._bias)), torch.tensor(list(self._bias.values()), dtype=torch.float32)
            self._bias_tensors = ids.to(device), values.to(device)
        return self._bias_tensors

    def cancel(self) -> None:
        """Give up what is left of the request; the worker frees its slots before its next step."""
        for sequence in self.sequences:
            sequence.ended = True


class Sequence:
    """Prompt and generated tokens of one row, and how many of them the cache holds.

    Everything a step needs to know follows from two numbers: a sequence lacks `len(tokens) - cached`
    tokens. One is a decode step, more is prefill, and a sequence that lost its slot begins again at 0.
    """

    def __init__(self, job: Job, index: int, spec: Row, sampling: SamplingParams) -> None:
        self.job = job
        self.arrival = next(_arrivals)
        self.index = index
        self.spec = spec
        self.sampling = sampling
        self.tokens = list(spec.prompt_ids)
        self.prompt_length = len(self.tokens)
        self.prompt_logprobs: list[TokenLogprob] = []
        self.slot: int | None = None
        self.cached = 0
        self.ended = False
        self.sound = False  # whether all it holds in the cache is known to be finite
        self.steer_key = tuple(sorted(spec.steer.items()))
        self.text_key = b""
        self.waits()

    @property
    def generated(self) -> int:
        """Tokens written so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def missing(self) -> int:
        """Tokens the cache lacks."""
        return len(self.tokens) - self.cached

    @property
    def reads_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are wanted and not all there yet."""
        wanted = self.sampling.echo and self.sampling.top_logprobs is not None
        return wanted and len(self.prompt_logprobs) < self.prompt_length - 1

    def waits(self) -> None:
        """Hold nothing in the cache. Sequences of equal `text_key` have the same tokens to read."""
        self.slot, self.cached, self.sound = None, 0, False
        if not self.generated:
            self.prompt_logprobs = []  # they are read again
        self.text_key = blake2b(array("q", self.tokens).tobytes()).digest()
