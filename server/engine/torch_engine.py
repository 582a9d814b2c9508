"""The default engine: a transformers model in this process, driven by one worker thread.

The worker loops: score requests first, since they are short and a slider waits for them, then one
decode step of every running generation in turn. Requests are not merged into one batch here; the
rows of one request are.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ipissa.adapter import Adapter
from ipissa.errors import IpissaError
from ipissa.evaluate.scoring import Choice, ChoiceScore, choice_scores, find_choices, score_choices
from ipissa.models import load_model
from ipissa.steering import attach

from .base import (
    AdapterExistsError,
    AdapterInUseError,
    Delta,
    Engine,
    GenerationRequest,
    OverloadedError,
    ScoreRequest,
    Steer,
    UnknownAdapterError,
)
from .generation import Generation, per_adapter

logger = logging.getLogger(__name__)
T = TypeVar("T")
DEFAULT_MODEL_LEN = 4096


class TorchEngine(Engine):
    """Serves one transformers model with adapters attached by `ipissa.attach`.

    Args:
        model_name: What `ipissa.load_model` takes; also the base model's id in the API.
        adapters: Adapters by the names requests use.
        max_batch: Most rows in one request, and most rows decoding at a time.
        max_queue: Most requests waiting or running; more are refused.
        max_model_len: Prompt and answer together, in tokens; at most what the model was made for.

    Raises:
        ModelLoadError, BaseModelMismatchError: at once, before anything runs.
    """

    def __init__(
        self,
        model_name: str,
        adapters: Mapping[str, Adapter],
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_batch: int = 64,
        max_queue: int = 128,
        max_model_len: int | None = None,
    ) -> None:
        self.model_name = model_name
        model, self.tokenizer = load_model(model_name, device=device, dtype=dtype)
        self._steered = attach(model, adapters)
        trained_for = getattr(model.config.get_text_config(), "max_position_embeddings", DEFAULT_MODEL_LEN)
        self.max_model_len = min(max_model_len or trained_for, trained_for)
        self.max_batch = max_batch
        self.vocab_size = min(len(self.tokenizer), model.get_input_embeddings().num_embeddings)
        self._max_queue = max_queue
        self._wake = threading.Condition()
        self._urgent: deque[_Call] = deque()  # scores and adapter changes
        self._waiting: deque[_Stream] = deque()
        self._running: list[_Stream] = []
        self._closed = False
        self._generated_tokens = 0
        self._worker = threading.Thread(target=self._work, name="ipissa-engine", daemon=True)
        self._worker.start()

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        return self._steered.adapters

    # --- called from the event loop -----------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        stream = _Stream(request, asyncio.get_running_loop())
        with self._wake:
            self._refuse_overload()
            self._waiting.append(stream)
            self._wake.notify()
        try:
            while (item := await stream.deltas.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stream.cancelled = True
            with self._wake:
                if stream in self._waiting:  # give its place in the queue to somebody who is still there
                    self._waiting.remove(stream)

    async def score(self, request: ScoreRequest) -> list[ChoiceScore]:
        with self._wake:
            self._refuse_overload()
        choices = find_choices(self.tokenizer, request.choices)
        parts = []
        # One call per batch of α: others get their turn in between, and a client that hangs up ends it.
        for start in range(0, len(request.steers), self.max_batch):
            steers = request.steers[start : start + self.max_batch]
            parts.append(await self._call(partial(self._score, request.context_ids, choices, steers)))
        return choice_scores(torch.cat(parts), choices)

    async def add_adapter(self, name: str, adapter: Adapter) -> None:
        await self._call(partial(self._add, name, adapter))

    async def remove_adapter(self, name: str) -> None:
        await self._call(partial(self._remove, name))

    def stats(self) -> dict[str, Any]:
        return {
            "queued": len(self._waiting) + len(self._urgent),
            "active_rows": sum(stream.rows for stream in list(self._running)),
            "generated_tokens": self._generated_tokens,
            "phase_cache": self._steered.phase_cache_info(),
        }

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._worker.join()
        self._steered.detach()

    def _refuse_overload(self) -> None:
        if self._closed:
            raise OverloadedError("The server is shutting down.")
        busy = len(self._waiting) + len(self._running) + len(self._urgent)
        if busy >= self._max_queue:
            raise OverloadedError(f"{busy} requests are waiting or running, the most this server takes; try again.")

    async def _call(self, function: Callable[[], T]) -> T:
        call = _Call(function, asyncio.get_running_loop())
        with self._wake:
            self._urgent.append(call)
            self._wake.notify()
        try:
            return await call.result
        finally:
            call.cancelled = True
            with self._wake:
                if call in self._urgent:
                    self._urgent.remove(call)

    # --- the worker thread --------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._urgent or self._waiting or self._running)
                if self._closed:
                    break
            self._run_urgent()
            self._admit()
            for stream in list(self._running):
                self._step(stream)
                self._run_urgent()
        left: list[_Stream | _Call] = [*self._running, *self._waiting, *self._urgent]
        for request in left:
            request.fail(OverloadedError("The server is shutting down."))

    def _run_urgent(self) -> None:
        while call := self._next(self._urgent):
            call.run()

    def _next(self, queue: deque[T]) -> T | None:
        with self._wake:
            return queue.popleft() if queue else None

    def _admit(self) -> None:
        """Start waiting requests, in order, while their rows fit."""
        while True:
            with self._wake:
                if not self._waiting:
                    return
                stream = self._waiting[0]
                rows = sum(running.rows for running in self._running)
                if self._running and rows + stream.rows > self.max_batch:
                    return
                self._waiting.popleft()
            try:
                stream.generation = Generation(self._steered, self.tokenizer, stream.request, self.max_model_len)
                self._running.append(stream)
            except Exception as error:
                self._fail(stream, error)

    def _step(self, stream: _Stream) -> None:
        try:
            if stream.cancelled:
                self._running.remove(stream)
                return
            assert stream.generation is not None
            deltas = stream.generation.step()
            self._generated_tokens += len(deltas)
            stream.put(deltas)
            if not stream.generation.live_rows:
                self._running.remove(stream)
                stream.put(None)
        except Exception as error:
            self._running.remove(stream)
            self._fail(stream, error)

    def _fail(self, stream: _Stream, error: Exception) -> None:
        if not isinstance(error, IpissaError):
            logger.exception("A generation failed")
        stream.fail(error)

    def _score(self, context_ids: list[int], choices: list[Choice], steers: list[Steer]) -> Tensor:
        with self._steered.alpha(per_adapter(steers)):
            return score_choices(self._steered.model, self.tokenizer, context_ids, choices, len(steers))

    def _add(self, name: str, adapter: Adapter) -> None:
        if name in self.adapters:
            raise AdapterExistsError(f"An adapter named {name!r} is loaded already; choose another name.")
        self._steered.add(name, adapter)

    def _remove(self, name: str) -> None:
        if name not in self.adapters:
            raise UnknownAdapterError(f"The adapter {name!r} is not loaded.")
        with self._wake:
            streams = [stream for stream in (*self._running, *self._waiting) if not stream.cancelled]
        if any(name in row.steer for stream in streams for row in stream.request.rows):
            raise AdapterInUseError(f"The adapter {name!r} steers requests that are still running; try again later.")
        self._steered.remove(name)


class _Stream:
    """A generation request between the event loop and the worker."""

    def __init__(self, request: GenerationRequest, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.deltas: asyncio.Queue[list[Delta] | BaseException | None] = asyncio.Queue()
        self.cancelled = False
        self.generation: Generation | None = None
        self._loop = loop

    @property
    def rows(self) -> int:
        return self.generation.live_rows if self.generation else len(self.request.rows)

    def put(self, item: list[Delta] | BaseException | None) -> None:
        """Hand over a step's deltas, or None after the last."""
        _call_soon(self._loop, self.deltas.put_nowait, item)

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        self.put(error)


class _Call:
    """A function the worker runs between decode steps."""

    def __init__(self, function: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self._function = function
        self._loop = loop
        self.result: asyncio.Future[Any] = loop.create_future()
        self.cancelled = False

    def run(self) -> None:
        """Run the function and hand over its result."""
        if self.cancelled:
            return
        try:
            value = self._function()
            _call_soon(self._loop, self._finish, self.result.set_result, value)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the call with an error."""
        _call_soon(self._loop, self._finish, self.result.set_exception, error)

    def _finish(self, setter: Callable[[Any], None], value: Any) -> None:
        if not self.result.done():
            setter(value)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> None:
    """Run `function` on the loop, unless it has closed because its server is gone."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)
