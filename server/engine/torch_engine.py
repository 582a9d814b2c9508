"""The default engine: a transformers model in this process, one batch for everybody.

A request becomes sequences; a worker thread drives them in steps:

    admit    sequences of waiting requests get slots                      (scheduler.py, cache.py)
    prefill  the next chunk of the texts that are not read yet            (runner.py, forward.py)
    decode   one token for every sequence that is, each at its own α
    emit     tokens go to the event loop, which turns them into text      (sampler.py, detokenizer.py)
    retire   sequences that ended, or that nobody waits for, free their slot

Score requests come first in every step, and `pace.py` bounds what may come between two decode steps.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from ipissa.adapter import AnyAdapter
from ipissa.errors import ConfigError, IpissaError
from ipissa.evaluate.scoring import ChoiceScore, find_choices
from ipissa.models import end_token_ids, load_model
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
    TokenLogprob,
    TokenOut,
    UnknownAdapterError,
)
from .cache import SlotCache
from .detokenizer import TextOut
from .pace import Pace
from .requests import Requests
from .runner import Read, Runner
from .sampler import choose_tokens, token_logprobs
from .scheduler import Scheduler
from .scores import ScoreJob, score_batch
from .sequence import Job, Sequence

logger = logging.getLogger(__name__)
T = TypeVar("T")
DEFAULT_MODEL_LEN = 4096
DEFAULT_CACHE_TOKENS = 65536


class TorchEngine(Engine):
    """Serves one transformers model with adapters attached by `ipissa.attach`.

    Args:
        model_name: What `ipissa.load_model` takes; also the base model's id in the API.
        adapters: Adapters by the names requests use.
        max_batch: Slots: most rows in one request, and most rows running at a time.
        max_queue: Most requests waiting or running; more are refused.
        max_model_len: Prompt and answer together, in tokens; at most what the model was made for.
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
        self._generated_tokens = 0
        self._wake = threading.Condition()  # guards the four below
        self._calls: deque[_Call] = deque()
        self._scores: deque[ScoreJob] = deque()
        self._arrived: deque[Job] = deque()
        self._closed = False
        # All tensor work happens in this one thread, loading too (`threads.py` says why).
        loaded: Future[None] = Future()
        load = partial(self._load, adapters, device=device, dtype=dtype, max_model_len=max_model_len)
        self._worker = threading.Thread(target=self._run, args=(load, loaded), name="ipissa-engine", daemon=True)
        self._worker.start()
        loaded.result()

    @property
    def adapters(self) -> Mapping[str, AnyAdapter]:
        return self._steered.adapters

    # --- called from the event loop -----------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        if len(request.rows) > self.max_batch:
            raise ConfigError(f"{len(request.rows)} rows are more than the {self.max_batch} that can run at a time.")
        with self._requests.counted(row.steer for row in request.rows):
            job = Job(request, asyncio.get_running_loop())
            texts = [TextOut(self.tokenizer, row, request.sampling) for row in request.rows]
            self._submit(self._arrived, job)
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
            self._submit(self._scores, job)
            try:
                return await job.result
            finally:
                job.cancelled = True

    async def add_adapter(self, name: str, adapter: AnyAdapter) -> None:
        await self._call(partial(self._add, name, adapter))

    async def remove_adapter(self, name: str) -> None:
        await self._call(partial(self._remove, name))

    def stats(self) -> dict[str, Any]:
        return {
            "queued": len(self._arrived) + len(self._scheduler.waiting) + len(self._scores),
            "active_rows": len(self._scheduler.running),
            "generated_tokens": self._generated_tokens,
            "phase_cache": self._steered.phase_cache_info(),
        }

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._worker.join()

    def _submit(self, queue: deque[T], item: T) -> None:
        with self._wake:
            if self._closed:
                raise OverloadedError("The server is shutting down.")
            queue.append(item)
            self._wake.notify()

    async def _call(self, function: Callable[[], None]) -> None:
        call = _Call(function, asyncio.get_running_loop())
        self._submit(self._calls, call)
        await call.result

    # --- the worker thread: load, then step by step -------------------------------------------

    def _run(self, load: Callable[[], None], loaded: Future[None]) -> None:
        try:
            load()
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        while self._wait_for_work():
            self._take_calls()
            self._score()
            try:
                self._admit()
                self._prefill()
                self._decode()
            except Exception as error:  # in no batch of its own, such as no memory left for the cache
                self._report(error)
                for job in dict.fromkeys(sequence.job for sequence in self._scheduler.abandon()):
                    _fail(job, error)
        self._end_everything()

    def _load(self, adapters: Mapping[str, AnyAdapter], *, device: str, dtype: str, max_model_len: int | None) -> None:
        model, self.tokenizer = load_model(self.model_name, device=device, dtype=dtype)
        self._steered = attach(model, adapters)
        trained_for = getattr(model.config.get_text_config(), "max_position_embeddings", DEFAULT_MODEL_LEN)
        self.max_model_len = min(max_model_len or trained_for, trained_for, self.max_cache_tokens)
        self.vocab_size = min(len(self.tokenizer), model.get_input_embeddings().num_embeddings)
        self._end_ids = end_token_ids(model.generation_config, self.tokenizer)
        cache = SlotCache(self.max_cache_tokens)
        self._runner = Runner(self._steered, cache)
        for adapter in adapters.values():
            self._runner.check(adapter)
        self._scheduler = Scheduler(cache, self.max_batch)
        self._pace = Pace(torch.cuda.synchronize) if model.device.type == "cuda" else Pace()
        self._scoring: Iterator[None] | None = None
        self._scoring_jobs: list[ScoreJob] = []

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._closed
                    or self._calls
                    or self._scores
                    or self._arrived
                    or self._scoring
                    or self._scheduler.running
                    or self._scheduler.waiting
                )
            )
            return not self._closed

    def _take_calls(self) -> None:
        while self._calls:
            self._calls.popleft().run()

    def _score(self) -> None:
        """One model call for scores: begin with all that wait, or go on with those that have begun."""
        if self._scoring is None and self._scores:
            jobs = [self._scores.popleft() for _ in range(len(self._scores))]
            jobs = [job for job in jobs if not job.cancelled and self._adapters_are_there(job, job.request.steers)]
            self._scoring, self._scoring_jobs = self._score_together(jobs), jobs
        if self._scoring is not None and next(self._scoring, "done") == "done":
            self._scoring, self._scoring_jobs = None, []

    def _score_together(self, jobs: list[ScoreJob]) -> Iterator[None]:
        """Scores of similar lengths share a batch; yields after every model call."""
        jobs = sorted(jobs, key=lambda job: job.tokens)
        while jobs:
            together = [job for job in jobs if job.tokens <= max(2 * jobs[0].tokens, 64)]
            jobs = jobs[len(together) :]
            try:
                for results in score_batch(self._runner, together, self._budget):
                    for job, result in zip(together, results, strict=False):
                        _call_soon(job.loop, _finish, job.result, result)
                    if all(job.cancelled for job in together):
                        break
                    yield
            except Exception as error:
                self._report(error)
                for job in together:
                    _call_soon(job.loop, _finish, job.result, error)

    def _budget(self) -> int:
        """Tokens that the next prefill or score call may have."""
        return self._pace.tokens(decoding=bool(self._scheduler.decoding))

    def _admit(self) -> None:
        while self._arrived:
            job = self._arrived.popleft()
            if not job.cancelled and self._adapters_are_there(job, [each.spec.steer for each in job.sequences]):
                self._scheduler.waiting.append(job.sequences)
        for sequence in [each for each in self._scheduler.running if each.ended]:
            self._scheduler.retire(sequence)
        self._scheduler.admit()

    def _prefill(self) -> None:
        scheduler = self._scheduler
        chunks = scheduler.next_chunks(self._budget())
        if not chunks:
            return
        sequences = [sequence for chunk in chunks for sequence in chunk.sequences]
        with self._failing(sequences), self._pace.prefill(sum(len(chunk.variants) * chunk.size for chunk in chunks)):
            reads = self._runner.prefill(chunks)
            _keep_prompt_logprobs(reads)
            complete = [
                (sequence, read.logits)
                for read in reads
                for sequence in read.sequences
                if read.index == len(sequence.tokens) - 1
            ]
            if complete:
                self._emit([sequence for sequence, _ in complete], torch.stack([logits for _, logits in complete]))
                for sequence, _ in complete:
                    if sequence.slot is not None:
                        scheduler.decode(sequence)

    def _decode(self) -> None:
        self._scheduler.grow()
        sequences = self._scheduler.running[: self._scheduler.decoding]
        if not sequences:
            return
        with self._failing(sequences), self._pace.decode():
            self._emit(sequences, self._runner.decode(sequences))

    def _emit(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Choose the next token of every sequence, hand them to the event loop, and retire what ended."""
        chosen = choose_tokens(logits, sequences)
        told = [i for i, sequence in enumerate(sequences) if sequence.sampling.top_logprobs is not None]
        logprobs: dict[int, TokenLogprob] = {}
        if told:
            tops = [sequences[i].sampling.top_logprobs or 0 for i in told]
            logprobs = dict(zip(told, token_logprobs(logits[told], chosen[told], tops), strict=True))
        outputs: dict[Job, list[TokenOut]] = {}
        for i, (sequence, token) in enumerate(zip(sequences, chosen.tolist(), strict=True)):
            output = self._advance(sequence, token, logprobs.get(i))
            outputs.setdefault(sequence.job, []).append(output)
            if sequence.ended:
                self._scheduler.retire(sequence)
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, list[TokenOut]]]] = {}
        for job, found in outputs.items():
            by_loop.setdefault(job.loop, []).append((job, found))
        for loop, items in by_loop.items():
            _call_soon(loop, _deliver, items)

    def _advance(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> TokenOut:
        """Append a token, unless none was asked for, and end the sequence if that ends it."""
        first = sequence.generated == 0 and sequence.sampling.echo
        prompt_logprobs = sequence.prompt_logprobs if first else None
        if sequence.sampling.max_tokens == 0:
            sequence.ended = True
            return TokenOut(sequence.index, None, None, prompt_logprobs, "length")
        sequence.tokens.append(token)
        self._generated_tokens += 1
        reason = None
        if token in self._end_ids:
            reason = "stop"
        elif sequence.generated >= sequence.sampling.max_tokens or len(sequence.tokens) >= self.max_model_len:
            reason = "length"
        sequence.ended = sequence.ended or reason is not None
        return TokenOut(sequence.index, token, logprob, prompt_logprobs, reason)

    # --- the worker thread: adapters, errors, the end -----------------------------------------

    def _adapters_are_there(self, job: Job | ScoreJob, steers: list[Steer]) -> bool:
        """Whether no adapter was unloaded since the request was read; it fails then, and nobody else's does."""
        gone = sorted({name for steer in steers for name in steer} - set(self.adapters))
        if gone:
            _fail(job, UnknownAdapterError(f"The adapter {gone[0]!r} was unloaded meanwhile."))
        return not gone

    def _add(self, name: str, adapter: AnyAdapter) -> None:
        if name in self.adapters:
            raise AdapterExistsError(f"An adapter named {name!r} is loaded already; choose another name.")
        self._runner.check(adapter)
        self._steered.add(name, adapter)
        self._runner.find_shared_layers()

    def _remove(self, name: str) -> None:
        if name not in self.adapters:
            raise UnknownAdapterError(f"The adapter {name!r} is not loaded.")
        waiting = [sequence for sequences in self._scheduler.waiting for sequence in sequences]
        arrived = [sequence for job in self._arrived for sequence in job.sequences]
        live = [each for each in (*self._scheduler.running, *waiting, *arrived) if not each.ended]
        scores = [steer for job in (*self._scoring_jobs, *self._scores) for steer in job.request.steers]
        if self._requests.use(name) or any(name in steer for steer in (*(each.spec.steer for each in live), *scores)):
            raise AdapterInUseError(f"The adapter {name!r} steers requests that are still running; try again later.")
        self._steered.remove(name)
        self._runner.find_shared_layers()

    @contextmanager
    def _failing(self, sequences: list[Sequence]) -> Iterator[None]:
        """An error in a batch ends the requests that were in it, and no others."""
        try:
            yield
        except Exception as error:
            self._report(error)
            for job in dict.fromkeys(sequence.job for sequence in sequences):
                _fail(job, error)

    def _report(self, error: Exception) -> None:
        if not isinstance(error, IpissaError):
            logger.exception("A model call failed")

    def _end_everything(self) -> None:
        error = OverloadedError("The server is shutting down.")
        self._scoring = None
        self._runner.close()
        self._steered.detach()
        for call in self._calls:
            _call_soon(call.loop, _finish, call.result, error)
        waiting = [sequence for sequences in self._scheduler.waiting for sequence in sequences]
        jobs = dict.fromkeys(sequence.job for sequence in (*self._scheduler.running, *waiting))
        left: list[Job | ScoreJob] = [*jobs, *self._arrived, *self._scoring_jobs, *self._scores]
        for job in left:
            _fail(job, error)


class _Call:
    """A function that the worker runs between steps."""

    def __init__(self, function: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        self._function = function
        self.loop = loop
        self.result: asyncio.Future[None] = loop.create_future()

    def run(self) -> None:
        """Run the function and hand over its result."""
        try:
            self._function()
            _call_soon(self.loop, _finish, self.result, None)
        except Exception as error:
            _call_soon(self.loop, _finish, self.result, error)


def _keep_prompt_logprobs(reads: list[Read]) -> None:
    """What the logits after each prompt token say about the next one."""
    wanted = [
        (read, sequence)
        for read in reads
        for sequence in read.sequences
        if sequence.reads_prompt_logprobs and read.index < sequence.prompt_length - 1
    ]
    if wanted:
        logits = torch.stack([read.logits for read, _ in wanted])
        following = torch.tensor([sequence.tokens[read.index + 1] for read, sequence in wanted], device=logits.device)
        tops = [sequence.sampling.top_logprobs or 0 for _, sequence in wanted]
        for (_, sequence), logprob in zip(wanted, token_logprobs(logits, following, tops), strict=True):
            sequence.prompt_logprobs.append(logprob)


def _deliver(items: list[tuple[Job, list[TokenOut]]]) -> None:
    for job, outputs in items:
        job.outputs.put_nowait(outputs)


def _fail(job: Job | ScoreJob, error: Exception) -> None:
    """End a request with an error."""
    if isinstance(job, ScoreJob):
        _call_soon(job.loop, _finish, job.result, error)
    else:
        job.cancel()
        _call_soon(job.loop, job.outputs.put_nowait, error)


def _finish(future: asyncio.Future[Any], result: object) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> None:
    """Run `function` on the loop, unless it has closed because its server is gone."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)
