"""vLLM behind the same interface: its own processes run the model, and every setting of the dials is a LoRA.

    row ──► Gate ──► LoRA of its setting ──► AsyncLLM.generate ──► tokens ──► text
            room?    baked if it is new      vLLM's batch           TextOut, as on the torch engine

A row at α = 0 is served without a LoRA. vLLM tells the prefixes it keeps apart by a LoRA's name and path, and ours
are named by the digests of the adapters' files and their α, so no setting reads another's keys and values.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from vllm import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.utils import random_uuid
from vllm.v1.engine.async_llm import AsyncLLM

from ipissa.adapter import Adapter, AnyAdapter
from ipissa.adapter.baking import Baker
from ipissa.adapter.base_model import check_base_files
from ipissa.errors import ConfigError, ModelLoadError
from ipissa.evaluate.scoring import Choice, ChoiceScore, choice_scores, find_choices
from ipissa.models import end_token_ids, model_source

from .base import (
    AdapterExistsError,
    AdapterInUseError,
    Delta,
    Engine,
    GenerationRequest,
    OverloadedError,
    Row,
    SamplingParams,
    ScoreRequest,
    Steer,
    TokenOut,
    UnknownAdapterError,
)
from .detokenizer import TextOut
from .overflow import check_scores
from .requests import Requests, check_loaded
from .vllm_gate import Gate
from .vllm_loras import Loras, Setting, setting_of
from .vllm_options import SCORE_ROWS, SCORE_SETTINGS, plan
from .vllm_scores import choice_logprobs
from .vllm_tokens import to_vllm, tokens_out


class VllmEngine(Engine):
    """Serves one model by vLLM, on as many devices and machines as its options say.

    Args:
        model_name: What `ipissa.load_model` takes; also the base model's id in the API.
        adapters: Adapters by the names requests use.
        max_batch: Most rows generated at a time.
        max_queue: Most requests waiting or running; more are refused.
        max_cache_tokens: Size of the key and value cache; vLLM's own choice if None, but on CPUs.
        options: Engine arguments of vLLM's by name, such as tensor_parallel_size.

    Raises:
        ModelLoadError, BaseModelMismatchError, ConfigError: at once, or in `start`, before anything is served.
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
        max_cache_tokens: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model_name, self.max_batch = model_name, max_batch
        self._source = model_source(model_name)
        self._read_config()
        turning = Baker(adapters).adapters
        for adapter in turning.values():
            check_base_files(self._source, adapter)
        started = plan(
            self._source,
            rank=Baker(turning).rank() if turning else 0,
            modules={module for adapter in turning.values() for module in adapter.modules},
            device=device,
            dtype=dtype,
            max_batch=max_batch,
            max_model_len=max_model_len,
            max_cache_tokens=max_cache_tokens,
            options=options or {},
        )
        self._max_rank = started.max_rank
        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**started.arguments))
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise ConfigError(f"vLLM does not start: {error}") from error
        self._describe(started.arguments["dtype"], turning)
        self._requests = Requests(max_queue)
        self._generated_tokens = 0
        self._gate = Gate(max_batch, started.max_loras)
        self._score_gate = Gate(SCORE_ROWS, SCORE_SETTINGS)
        self._running: dict[asyncio.Task[Any], asyncio.AbstractEventLoop] = {}
        self._adding = asyncio.Lock()
        self._untried: str | None = None  # an adapter that vLLM may yet refuse
        self._closed = False

    def _read_config(self) -> None:
        """Tokenizer, vocabulary and end tokens, from the model's files."""
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self._source)
            config = AutoConfig.from_pretrained(self._source)
        except (OSError, ValueError, KeyError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelLoadError(f"The model {self.model_name!r} cannot be loaded: {first}") from error
        try:
            generation = GenerationConfig.from_pretrained(self._source)
        except OSError:  # the model comes without
            generation = GenerationConfig.from_model_config(config)
        self._end_ids = sorted(end_token_ids(generation, self.tokenizer))
        self.vocab_size = min(len(self.tokenizer), config.get_text_config().vocab_size)

    def _describe(self, dtype: str, adapters: Mapping[str, Adapter]) -> None:
        """What vLLM has found out about itself, and the store for its LoRAs."""
        self._dtype, config = dtype, self._llm.vllm_config
        self.max_model_len = config.model_config.max_model_len
        self.max_cache_tokens = (config.cache_config.num_gpu_blocks or 1) * config.cache_config.block_size
        self._loras = Loras(adapters, dtype=dtype, at_least=self.max_batch + SCORE_ROWS)

    async def start(self) -> None:
        """Load every adapter once, so that what vLLM cannot take is refused before anything is served.

        The first log-probabilities cost vLLM a compilation of half a minute; they are asked for here.
        """
        try:
            if self._max_rank:
                await self._llm.collective_rpc("keep_base_rows_unsteered")
            for name in self.adapters:
                await self._try(name)
            await self.score(ScoreRequest(self._end_ids, ["Yes", "No"], [{}]))
        except BaseException:
            await asyncio.to_thread(self.close)
            raise

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        return {name: adapter for name, adapter in self._loras.adapters.items() if name != self._untried}

    @property
    def healthy(self) -> bool:
        return not self._closed and not self._llm.errored

    # --- generations --------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        if len(request.rows) > self.max_batch:
            raise ConfigError(f"{len(request.rows)} rows are more than the {self.max_batch} that can run at a time.")
        with self._taken([row.steer for row in request.rows], request.digests):
            texts = [TextOut(self.tokenizer, row, request.sampling) for row in request.rows]
            outputs: asyncio.Queue[TokenOut | BaseException] = asyncio.Queue()
            tasks = [
                self._task(self._generate_row(i, row, request.sampling, outputs)) for i, row in enumerate(request.rows)
            ]
            try:
                while not all(text.ended for text in texts):
                    deltas = []
                    for output in await _all_there(outputs):
                        if isinstance(output, BaseException):
                            raise output
                        deltas += texts[output.row].deltas(output)
                        if texts[output.row].ended:  # a stop string is found here, which vLLM does not see
                            tasks[output.row].cancel()
                    self._generated_tokens += sum(delta.tokens for delta in deltas)
                    if deltas:
                        yield deltas
            finally:
                await _cancelled(tasks)

    async def _generate_row(
        self, index: int, row: Row, sampling: SamplingParams, outputs: asyncio.Queue[TokenOut | BaseException]
    ) -> None:
        """One row, from waiting for its turn to its last token or its error."""
        told_end = False
        try:
            setting = setting_of(row.steer)
            async with self._gate.enter(setting or None), self._lora(setting) as lora:
                params = to_vllm(row, sampling, self._end_ids)
                prompt = TokensPrompt(prompt_token_ids=row.prompt_ids)
                async for output in self._llm.generate(prompt, params, random_uuid(), lora_request=lora):
                    for token in tokens_out(index, output, row, sampling):
                        told_end = token.finish_reason is not None
                        outputs.put_nowait(token)
            if not told_end:
                raise RuntimeError("vLLM ended a row before its answer was complete; send the request again.")
        except asyncio.CancelledError:
            if self._closed:
                outputs.put_nowait(OverloadedError("The server is shutting down."))
            raise
        except VLLMClientError as error:
            outputs.put_nowait(ConfigError(str(error)))
        except Exception as error:
            outputs.put_nowait(error)

    # --- scores -------------------------------------------------------------------------------

    async def score(self, request: ScoreRequest) -> list[ChoiceScore]:
        choices = find_choices(self.tokenizer, request.choices)
        with self._taken(request.steers, request.digests):
            settings = list(dict.fromkeys(setting_of(steer) for steer in request.steers))
            tasks = {setting: self._task(self._score_at(setting, request.context_ids, choices)) for setting in settings}
            try:
                found = dict(zip(settings, await asyncio.gather(*tasks.values()), strict=True))
            except asyncio.CancelledError:
                if self._closed:
                    raise OverloadedError("The server is shutting down.") from None
                raise
            finally:
                await _cancelled(tasks.values())
        logprobs = torch.tensor([found[setting_of(steer)] for steer in request.steers], dtype=torch.float64)
        scores = choice_scores(logprobs, choices)
        check_scores(scores, request.steers, self._dtype)
        return scores

    async def _score_at(self, setting: Setting, context: list[int], choices: list[Choice]) -> list[float]:
        try:
            async with self._score_gate.enter(setting or None), self._lora(setting) as lora:
                return await choice_logprobs(self._llm, context, choices, lora)
        except VLLMClientError as error:
            raise ConfigError(str(error)) from error

    # --- adapters -----------------------------------------------------------------------------

    async def add_adapter(self, name: str, adapter: AnyAdapter) -> None:
        async with self._adding:  # one after the other, as each is checked with those that are there
            await self._add(name, adapter)

    async def _add(self, name: str, adapter: AnyAdapter) -> None:
        if name in self.adapters:
            raise AdapterExistsError(f"An adapter named {name!r} is loaded already; choose another name.")
        baker = Baker({**self.adapters, name: adapter})
        await asyncio.to_thread(check_base_files, self._source, baker.adapters[name])
        rank = baker.rank()
        if rank > self._max_rank:
            raise ConfigError(
                f"With the adapter {name!r} the adapters together have rank {rank}, and this server takes "
                f"{self._max_rank}; start it with a larger --vllm max_lora_rank=RANK."
            )
        self._untried = name
        self._loras.adapters[name] = baker.adapters[name]
        try:
            await self._try(name)
        except BaseException:
            del self._loras.adapters[name]
            raise
        finally:
            self._untried = None

    async def remove_adapter(self, name: str) -> None:
        self._must_have(name)
        if self._requests.use(name):
            raise AdapterInUseError(f"The adapter {name!r} steers requests that are still running; try again later.")
        del self._loras.adapters[name]

    async def _try(self, name: str) -> None:
        """Load an adapter at one α, or ConfigError with vLLM's reason."""
        adapter = self._loras.adapters[name]
        low, high = adapter.alpha_range
        async with self._loras.held(((name, high or low),)) as lora:
            try:
                await self._llm.add_lora(lora)
            except Exception as error:
                raise ConfigError(f"vLLM does not take the adapter {name!r}: {error}") from error
        found = await self._llm.collective_rpc("unreached_modules", args=(list(adapter.modules),))
        if missing := set.intersection(*map(set, found)):
            raise ConfigError(
                f"vLLM does not take the adapter {name!r}: no LoRA reaches {len(missing)} of its layers, such as "
                f"{min(missing)}. Name the adapter at start, or start with --vllm lora_target_modules=null."
            )

    @asynccontextmanager
    async def _lora(self, setting: Setting) -> AsyncIterator[LoRARequest | None]:
        for name, _ in setting:
            self._must_have(name)
        async with self._loras.held(setting) as lora:
            yield lora

    def _must_have(self, name: str) -> None:
        if name not in self.adapters:
            raise UnknownAdapterError(f"The adapter {name!r} is not loaded.")

    # --- bookkeeping --------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        return {
            "queued": self._gate.waiting + self._score_gate.waiting,
            "active_rows": self._gate.inside,
            "generated_tokens": self._generated_tokens,
            "phase_cache": self._loras.info(),
        }

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for task, loop in list(self._running.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)
        self._llm.shutdown()
        del self._llm  # it shuts down again when it goes, which must be before the interpreter does
        self._loras.close()

    @contextmanager
    def _taken(self, steers: list[Steer], digests: Mapping[str, str]) -> Iterator[None]:
        """Counts a request, whose adapters stay as they are from then on, or refuses it."""
        if self._closed:
            raise OverloadedError("The server is shutting down.")
        with self._requests.counted(steers):
            check_loaded(self.adapters, steers, digests)
            yield

    def _task(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._running[task] = asyncio.get_running_loop()
        task.add_done_callback(self._running.pop)
        return task


async def _all_there(outputs: asyncio.Queue[Any]) -> list[Any]:
    """What is in the queue, at least one."""
    found = [await outputs.get()]
    while not outputs.empty():
        found.append(outputs.get_nowait())
    return found


async def _cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
