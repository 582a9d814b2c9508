"""The default engine: a transformers model in this process, one batch for everybody.

This is the side of the event loop. A request goes into the mailbox of the worker thread (`worker.py`), which
puts its sequences into the batch; tokens come back and become text here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any

from ipissa.adapter import AnyAdapter
from ipissa.errors import ConfigError
from ipissa.evaluate.scoring import ChoiceScore, find_choices

from .base import Delta, Engine, GenerationRequest, ScoreRequest
from .detokenizer import TextOut
from .mailbox import Call, Mailbox
from .requests import Requests
from .scores import ScoreJob
from .sequence import Job
from .worker import Worker

DEFAULT_CACHE_TOKENS = 65536


class TorchEngine(Engine):
    """Serves one transformers model with adapters attached by `ipissa.attach`.

    Args:
        model_name: What `ipissa.load_model` takes; also the base model's id in the API.
        adapters: Adapters by the names requests use.
        max_batch: Slots: most rows in one request, and most rows running at a time.
        max_queue: Most requests waiting or running; more are refused.
        max_model_len: Prompt and answer together, in tokens; None for as many as the model was made for.
        max_cache_tokens: Most positions in the cache, slots x longest sequence.

    Raises:
        ModelLoadError, BaseModelMismatchError, ConfigError: at once, before anything runs.
    """

    def __init__(
        self,
        model_name: str,
        adapters: Mapping[str, AnyAdapter],
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_batch: int = 64,
        max_queue: int = 128,
        max_model_len: int | None = None,
        max_cache_tokens: int = DEFAULT_CACHE_TOKENS,
    ) -> None:
        self.model_name = model_name
        self.max_batch = max_batch
        self.max_cache_tokens = max_cache_tokens
        self._requests = Requests(max_queue)
        self._mailbox = Mailbox()
        self._worker = Worker(
            model_name,
            adapters,
            self._mailbox,
            device=device,
            dtype=dtype,
            max_batch=max_batch,
            max_model_len=max_model_len,
            max_cache_tokens=max_cache_tokens,
        )
        self.tokenizer = self._worker.tokenizer
        self.max_model_len = self._worker.max_model_len
        self.vocab_size = self._worker.vocab_size

    @property
    def adapters(self) -> Mapping[str, AnyAdapter]:
        return self._worker.adapters

    @property
    def healthy(self) -> bool:
        return self._worker.alive

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        if len(request.rows) > self.max_batch:
            raise ConfigError(f"{len(request.rows)} rows are more than the {self.max_batch} that can run at a time.")
        with self._requests.counted(row.steer for row in request.rows):
            job = Job(request, asyncio.get_running_loop())
            texts = [TextOut(self.tokenizer, row, request.sampling) for row in request.rows]
            self._mailbox.put(job)
            try:
                while not all(text.ended for text in texts):
                    outputs = await job.outputs.get()
                    if isinstance(outputs, Exception):
                        raise outputs
                    deltas = [delta for output in outputs for delta in texts[output.row].deltas(output)]
                    for delta in deltas:
                        if delta.finish_reason:  # a stop string is found here, which the worker cannot see
                            job.sequences[delta.row].ended = True
                    if deltas:
                        yield deltas
            finally:
                job.cancel()

    async def score(self, request: ScoreRequest) -> list[ChoiceScore]:
        with self._requests.counted(request.steers):
            # The first call reads the whole vocabulary, which must not hold up the event loop.
            choices = await asyncio.to_thread(find_choices, self.tokenizer, request.choices)
            job = ScoreJob(request, choices, asyncio.get_running_loop())
            self._mailbox.put(job)
            try:
                return await job.result
            finally:
                job.cancelled = True

    async def add_adapter(self, name: str, adapter: AnyAdapter) -> None:
        await self._call(partial(self._worker.add, name, adapter))

    async def remove_adapter(self, name: str) -> None:
        await self._call(partial(self._worker.remove, name, named=self._requests.use))

    def stats(self) -> dict[str, Any]:
        return self._worker.stats()

    def close(self) -> None:
        self._mailbox.close()
        self._worker.join()

    async def _call(self, function: Callable[[], None]) -> None:
        call = Call(function, asyncio.get_running_loop())
        self._mailbox.put(call)
        await call.result
