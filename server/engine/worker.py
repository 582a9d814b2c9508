"""The worker thread of the default engine: all tensor work, in steps.

    admit    sequences of waiting requests get slots                      (scheduler.py, cache.py)
    prefill  the next chunk of the texts that are not read yet            (runner.py, forward.py)
    decode   one token for every sequence that is, each at its own α
    emit     tokens go to the event loop, which turns them into text      (sampler.py, mailbox.py)
    retire   sequences that ended, or that nobody waits for, free their slot

Score requests come first in every step, and `pace.py` bounds what may come between two decode steps.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from ipissa.adapter import AnyAdapter
from ipissa.errors import ConfigError, IpissaError
from ipissa.evaluate.scoring import ChoiceScore
from ipissa.models import end_token_ids, load_model
from ipissa.steering import attach

from .base import (
    AdapterExistsError,
    AdapterInUseError,
    OverloadedError,
    Steer,
    TokenLogprob,
    TokenOut,
    UnknownAdapterError,
)
from .cache import SlotCache
from .mailbox import Mailbox, answer, fail, hand_over
from .overflow import check_scores, overflow
from .pace import Pace
from .requests import check_loaded
from .runner import Read, Runner
from .sampler import choose_tokens, token_logprobs
from .scheduler import Scheduler
from .scores import ScoreJob, of_similar_length, score_batch
from .sequence import Job, Sequence

logger = logging.getLogger(__name__)
DEFAULT_MODEL_LEN = 4096
SCORES_IN_TURN = 8  # batches of them that have begun; each holds a text's hidden states


class Worker:
    """Loads the model in its thread, and takes work out of the mailbox until that is closed.

    Args:
        mailbox: Where the event loop leaves requests.
        device, dtype: What `ipissa.load_model` takes.
        max_batch: Slots.
        max_model_len: As `TorchEngine`'s.
        max_cache_tokens: As `TorchEngine`'s.

    Raises:
        ModelLoadError, BaseModelMismatchError, ConfigError: the thread has ended then.
    """

    def __init__(
        self,
        model_name: str,
        adapters: Mapping[str, AnyAdapter],
        mailbox: Mailbox,
        *,
        device: str,
        dtype: str,
        max_batch: int,
        max_model_len: int | None,
        max_cache_tokens: int,
    ) -> None:
        self._mailbox = mailbox
        self._generated_tokens = 0
        self._scoring: deque[tuple[list[ScoreJob], Iterator[None]]] = deque()  # jobs, and a step of them

        def load() -> None:
            model, self.tokenizer = load_model(model_name, device=device, dtype=dtype)
            self._steered = attach(model, adapters)
            self.max_model_len = _model_len(model.config.get_text_config(), max_model_len, max_cache_tokens)
            self.vocab_size = min(len(self.tokenizer), model.get_input_embeddings().num_embeddings)
            self._end_ids = end_token_ids(model.generation_config, self.tokenizer)
            cache = SlotCache(max_cache_tokens)
            self._runner = Runner(self._steered, cache)
            for adapter in adapters.values():
                self._runner.check(adapter)
            self._scheduler = Scheduler(cache, max_batch)
            self._pace = Pace.on(model.device)

        # All tensor work happens in this one thread, loading too (`threads.py` says why).
        loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(load, loaded), name="ipissa-engine", daemon=True)
        self._thread.start()
        loaded.result()

    # --- called from other threads ------------------------------------------------------------

    @property
    def adapters(self) -> Mapping[str, AnyAdapter]:
        """The adapters on the model."""
        return self._steered.adapters

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stats(self) -> dict[str, Any]:
        """What `Engine.stats` says."""
        return {
            "queued": len(self._mailbox.generations) + len(self._scheduler.waiting) + len(self._mailbox.scores),
            "active_rows": len(self._scheduler.running),
            "generated_tokens": self._generated_tokens,
            "phase_cache": self._steered.phase_cache_info(),
        }

    def join(self) -> None:
        """Wait until the thread has ended, which closing the mailbox makes it do."""
        self._thread.join()

    # --- calls: run by the worker between two steps -------------------------------------------

    def add(self, name: str, adapter: AnyAdapter) -> None:
        """Put one more adapter on the model, or leave it as it was."""
        if name in self.adapters:
            raise AdapterExistsError(f"An adapter named {name!r} is loaded already; choose another name.")
        self._runner.check(adapter)
        self._steered.add(name, adapter)
        try:
            self._runner.find_shared_layers()
        except BaseException:  # with layers taken for shared that it steers, scores would be half steered
            self._steered.remove(name)
            raise

    def remove(self, name: str, *, named: Callable[[str], bool]) -> None:
        """Take an adapter off the model.

        Args:
            named: Whether a request that somebody waits for names an adapter; one that nobody waits for may still run.
        """
        if name not in self.adapters:
            raise UnknownAdapterError(f"The adapter {name!r} is not loaded.")
        scheduler, mailbox = self._scheduler, self._mailbox
        waiting = [sequence for sequences in scheduler.waiting for sequence in sequences]
        generations, scores = mailbox.requests()
        arrived = [sequence for job in generations for sequence in job.sequences]
        live = [each.spec.steer for each in (*scheduler.running, *waiting, *arrived) if not each.ended]
        scored = [job.request.steers for job in (*self._scoring_jobs(), *scores) if not job.cancelled]
        if named(name) or any(name in steer for steer in chain(live, *scored)):
            raise AdapterInUseError(f"The adapter {name!r} steers requests that are still running; try again later.")
        self._steered.remove(name)
        self._runner.find_shared_layers()

    # --- the thread: load, then step by step --------------------------------------------------

    def _run(self, load: Callable[[], None], loaded: Future[None]) -> None:
        try:
            load()
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        try:
            while self._mailbox.wait(self._has_work):
                self._step()
        finally:  # of a thread that dies, too, nobody must be left waiting
            self._mailbox.close()
            self._end_everything()

    def _step(self) -> None:
        self._take_calls()
        self._score()
        try:
            self._admit()
            self._prefill()
            self._decode()
        except Exception as error:  # in no batch of its own, such as no memory left for the cache
            self._report(error)
            for job in dict.fromkeys(sequence.job for sequence in self._scheduler.abandon()):
                fail(job, error)

    def _has_work(self) -> bool:
        return bool(self._scoring or self._scheduler.running or self._scheduler.waiting)

    def _take_calls(self) -> None:
        while self._mailbox.calls:
            self._mailbox.calls.popleft().run()

    def _score(self) -> None:
        """One model call for scores. Those that came together take turns with those that came before them."""
        self._mailbox.drop_cancelled_scores()
        if len(self._scoring) < SCORES_IN_TURN:
            arrived = self._mailbox.take_scores()
            there = [job for job in arrived if self._adapters_are_there(job, job.request.steers)]
            self._scoring.extend((jobs, self._score_together(jobs)) for jobs in of_similar_length(there))
        while self._scoring:
            _, calls = self._scoring[0]
            if next(calls, "done") != "done":
                self._scoring.rotate(-1)
                return
            self._scoring.popleft()

    def _score_together(self, jobs: list[ScoreJob]) -> Iterator[None]:
        """Answer each as soon as it is scored; yields after every model call."""
        try:
            for scored in score_batch(self._runner, jobs, self._budget):
                for job, result in scored:
                    self._answer_score(job, result)
                yield
        except Exception as error:
            self._report(error)
            for job in jobs:
                fail(job, error)

    def _answer_score(self, job: ScoreJob, result: list[ChoiceScore]) -> None:
        try:
            check_scores(result, job.request.steers, self._steered.model.dtype)
        except ConfigError as error:
            fail(job, error)
        else:
            answer(job, result)

    def _scoring_jobs(self) -> list[ScoreJob]:
        return [job for jobs, _ in self._scoring for job in jobs]

    def _budget(self) -> int:
        """Tokens that the next prefill or score call may have."""
        return self._pace.tokens(decoding=bool(self._scheduler.decoding))

    def _admit(self) -> None:
        while self._mailbox.generations:
            job = self._mailbox.generations.popleft()
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
        self._fail_overflowed(sequences, logits.gather(-1, chosen[:, None])[:, 0])
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
        hand_over(outputs)

    def _fail_overflowed(self, sequences: list[Sequence], chosen_logits: torch.Tensor) -> None:
        """End the requests whose keys, values or logits are not finite; (sequences,) logits tell."""
        for sequence, sound in zip(sequences, chosen_logits.isfinite().tolist(), strict=True):
            sequence.sound = sound
            if not sound:
                fail(sequence.job, overflow(sequence.spec.steer, self._steered.model.dtype))

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

    # --- errors and the end -------------------------------------------------------------------

    def _adapters_are_there(self, job: Job | ScoreJob, steers: list[Steer]) -> bool:
        """Whether no adapter was unloaded since the request was read; it fails then, and nobody else's does."""
        try:
            check_loaded(self.adapters, steers, job.digests)
        except UnknownAdapterError as error:
            fail(job, error)
            return False
        return True

    @contextmanager
    def _failing(self, sequences: list[Sequence]) -> Iterator[None]:
        """An error in a batch ends the requests that were in it, and no others."""
        try:
            yield
        except Exception as error:
            self._report(error)
            for job in dict.fromkeys(sequence.job for sequence in sequences):
                fail(job, error)

    def _report(self, error: Exception) -> None:
        if not isinstance(error, IpissaError):
            logger.exception("A model call failed")

    def _end_everything(self) -> None:
        error = OverloadedError("The server is shutting down.")
        self._runner.close()
        self._steered.detach()
        for call in self._mailbox.calls:
            answer(call, error)
        waiting = [sequence for sequences in self._scheduler.waiting for sequence in sequences]
        jobs = dict.fromkeys(sequence.job for sequence in (*self._scheduler.running, *waiting))
        generations, scores = self._mailbox.requests()
        left: list[Job | ScoreJob] = [*jobs, *generations, *self._scoring_jobs(), *scores]
        self._scoring.clear()
        for job in left:
            fail(job, error)


def _model_len(config: Any, asked: int | None, max_cache_tokens: int) -> int:
    """Most tokens of prompt and answer together: what was asked for, or else what model and cache allow."""
    made_for: int | None = getattr(config, "max_position_embeddings", None)
    if asked is None:
        length = made_for or DEFAULT_MODEL_LEN
        if length > max_cache_tokens:
            logger.warning(
                "Requests may have %d tokens, as max_cache_tokens, where the model takes %d; raise --max-cache-tokens "
                "for longer ones.",
                max_cache_tokens,
                length,
            )
        return min(length, max_cache_tokens)
    if made_for is not None and asked > made_for:
        raise ConfigError(f"max_model_len {asked} is more than the {made_for} tokens the model was made for; lower it.")
    if asked > max_cache_tokens:
        raise ConfigError(
            f"max_model_len {asked} is more than max_cache_tokens {max_cache_tokens}; lower it, or raise the latter."
        )
    return asked


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
