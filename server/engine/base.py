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

from ipissa.adapter import AnyAdapter
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
    echo: bool = False  # the prompt, and its log-probabilities if those are reported, come first

    @property
    def changes_logits(self) -> bool:
        """Whether logits are adjusted before anything is chosen."""
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty)


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
    digests: Mapping[str, str] = field(default_factory=dict)  # of the adapters it was read for, by name


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability before temperature and filters, and the likeliest alternatives.

    The first token of a prompt has neither.
    """

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class TokenOut:
    """A token that a step chose for a row; the engine's own, before it is text."""

    row: int
    token_id: int | None  # None where a row ends without one
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] | None = None  # with the first token of rows that echo
    finish_reason: str | None = None


@dataclass(frozen=True)
class Delta:
    """What one step adds to one row: the echoed prompt, or one token."""

    row: int
    text: str
    tokens: int  # generated tokens this adds: 1, or 0 for an echo
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" or "length" on the row's last delta


@dataclass(frozen=True)
class ScoreRequest:
    """Log-probabilities of `choices` right after `context_ids`, at each steering setting."""

    context_ids: list[int]
    choices: list[str]
    steers: list[Steer]
    digests: Mapping[str, str] = field(default_factory=dict)  # of the adapters it was read for, by name


class Engine(ABC):
    """Runs a base model with adapters. Methods are called from one asyncio loop."""

    model_name: str
    tokenizer: Any
    max_model_len: int
    max_batch: int
    max_cache_tokens: int  # rows x longest row that are kept in memory
    vocab_size: int  # token ids below this can be read and generated

    async def start(self) -> None:
        """What of loading needs the event loop that will call the engine; before any other method.

        Raises:
            IpissaError: it cannot be loaded after all, and is closed.
        """
        return None

    @property
    def healthy(self) -> bool:
        """Whether it can still answer; one that cannot must be started anew."""
        return True

    @property
    @abstractmethod
    def adapters(self) -> Mapping[str, AnyAdapter]:
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
    async def add_adapter(self, name: str, adapter: AnyAdapter) -> None:
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
