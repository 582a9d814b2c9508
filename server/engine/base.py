"""The interface every engine has, and the plain values that cross it.

A request is a set of rows. A row is one sequence to generate: its prompt, the α of each adapter, and
which stream of sampling noise it draws from. Rows of one noise stream draw the same noise whatever
their α, so that generations differ by steering alone. Nothing here knows HTTP.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ipissa.adapter import Adapter
from ipissa.errors import IpissaError
from ipissa.evaluate.scoring import ChoiceScore

Steer = Mapping[str, float]  # adapter name -> α; adapters not named are at 0


class EngineLoadingError(IpissaError, RuntimeError):
    """The model is still being loaded."""


class OverloadedError(IpissaError, RuntimeError):
    """The queue is full."""


class AdapterInUseError(IpissaError, RuntimeError):
    """The adapter steers requests that are still running."""


class UnknownAdapterError(IpissaError, LookupError):
    """No adapter of that name is loaded (any more)."""


class AdapterExistsError(IpissaError, ValueError):
    """An adapter of that name is loaded already."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, the same for all rows of a request."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None  # None: no log-probabilities are reported


@dataclass(frozen=True)
class Row:
    """One sequence to generate."""

    prompt_ids: list[int]
    steer: Steer
    noise: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """Rows that are generated together."""

    rows: list[Row]
    sampling: SamplingParams


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability before temperature and filters, and the likeliest alternatives."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Delta:
    """What one decode step adds to one row."""

    row: int
    text: str
    token_id: int
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None  # "stop" or "length" on the row's last delta


@dataclass(frozen=True)
class ScoreRequest:
    """Log-probabilities of `choices` right after `context_ids`, at each steering setting."""

    context_ids: list[int]
    choices: list[str]
    steers: list[Steer]


class Engine(ABC):
    """Runs a base model with adapters. Methods are called from one asyncio loop."""

    model_name: str
    tokenizer: Any
    max_model_len: int
    max_batch: int
    vocab_size: int  # token ids below this can be read and generated

    @property
    @abstractmethod
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters that requests may name."""

    @abstractmethod
    def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        """Yield the deltas of each decode step until every row has finished.

        Closing the iterator cancels the request and frees what it holds before the next decode step.

        Raises:
            OverloadedError: the queue is full.
        """

    @abstractmethod
    async def score(self, request: ScoreRequest) -> list[ChoiceScore]:
        """One score per steering setting, in order. Does not wait behind generations."""

    @abstractmethod
    async def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Make one more adapter available; `AdapterExistsError`, or `BaseModelMismatchError` if it does not fit."""

    @abstractmethod
    async def remove_adapter(self, name: str) -> None:
        """Take an adapter away; `UnknownAdapterError`, or `AdapterInUseError` while requests use it."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Counters for `/metrics`: queued, active_rows, generated_tokens, and phase_cache by adapter."""

    @abstractmethod
    def close(self) -> None:
        """Stop, ending running requests."""
