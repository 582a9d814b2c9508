"""What the vLLM engine does with rows and adapters when vLLM ends them or is slow; vLLM itself is a fake here."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ipissa_server.engine.base import (
    AdapterExistsError,
    GenerationRequest,
    Row,
    SamplingParams,
    ScoreRequest,
    UnknownAdapterError,
)
from ipissa_server.engine.requests import Requests
from ipissa_server.engine.vllm_gate import Gate

from ipissa.errors import ConfigError

WAIT = 20  # seconds; far more than anything here takes
STANDINS = {
    "vllm": ("AsyncEngineArgs", "SamplingParams", "RequestOutput"),
    "vllm.sampling_params": ("RequestOutputKind",),
    "vllm.exceptions": (),
    "vllm.inputs": ("TokensPrompt",),
    "vllm.lora": (),
    "vllm.lora.request": ("LoRARequest",),
    "vllm.utils": ("random_uuid",),
    "vllm.v1": (),
    "vllm.v1.engine": (),
    "vllm.v1.engine.async_llm": ("AsyncLLM",),
    "vllm.config": (),
    "vllm.config.lora": ("MaxLoRARanks",),
    "vllm.platforms": ("current_platform",),
}


class Anything:
    """Takes any arguments and has any constant."""

    DELTA = FINAL_ONLY = None

    def __init__(self, *args: Any, **more: Any) -> None: ...


@pytest.fixture
def vllm_engine() -> Iterator[Any]:
    """The module of the engine, on a vLLM of stand-ins that are gone afterwards."""
    ours = ("ipissa_server.engine.vllm_" + name for name in ("engine", "loras", "options", "scores", "tokens"))
    before = {name: sys.modules.pop(name, None) for name in (*STANDINS, *ours)}
    for name, members in STANDINS.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(dict.fromkeys(members, Anything))
    vars(sys.modules["vllm.exceptions"])["VLLMClientError"] = type("VLLMClientError", (Exception,), {})
    try:
        yield import_module("ipissa_server.engine.vllm_engine")
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


class Loras:
    """Adapters whose settings are ready at once."""

    def __init__(self) -> None:
        self.adapters: dict[str, Any] = {}

    @asynccontextmanager
    async def held(self, setting: Any) -> AsyncIterator[Any]:
        yield setting or None


def engine_on(module: Any, llm: Any, tokenizer: Any = None) -> Any:
    """An engine as it is after its start."""
    engine = module.VllmEngine.__new__(module.VllmEngine)
    vars(engine).update(
        tokenizer=tokenizer,
        max_batch=4,
        _source="model",
        _end_ids=[2],
        _max_rank=32,
        _gate=Gate(4, 2),
        _requests=Requests(8),
        _generated_tokens=0,
        _loras=Loras(),
        _llm=llm,
        _running={},
        _closed=False,
        _adding=asyncio.Lock(),
        _untried=None,
        _dtype="bfloat16",
    )
    return engine


class Aborting:
    """Writes some tokens, and then ends for a reason of its own."""

    def __init__(self, reason: str, tokens: int) -> None:
        self.reason, self.tokens = reason, tokens

    async def generate(self, *args: Any, **more: Any) -> AsyncIterator[Any]:
        for token in range(self.tokens):
            yield self._output([5 + token], None)
        yield self._output([], self.reason)

    def _output(self, tokens: list[int], reason: str | None) -> Any:
        completion = SimpleNamespace(token_ids=tokens, finish_reason=reason, logprobs=None)
        return SimpleNamespace(outputs=[completion], prompt_logprobs=None)


@pytest.mark.parametrize("reason", ["abort", "error", "repetition"])
@pytest.mark.parametrize(("tokens", "max_tokens"), [(0, 9), (2, 9), (0, 0)])
def test_a_row_that_vllm_gives_up_is_an_error_and_waits_for_nothing(
    vllm_engine: Any, tokenizer: Any, reason: str, tokens: int, max_tokens: int
) -> None:
    request = GenerationRequest([Row([5, 6], {})], SamplingParams(max_tokens=max_tokens))

    async def scenario() -> None:
        engine = engine_on(vllm_engine, Aborting(reason, tokens), tokenizer)
        async with asyncio.timeout(WAIT):
            async for _ in engine.generate(request):
                pass

    with pytest.raises(RuntimeError, match="vLLM ended a row before its answer was complete"):
        asyncio.run(scenario())


class Trying:
    """Takes LoRAs when it is told to, or refuses them."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def add_lora(self, lora: Any) -> None:
        self.asked.set()
        await self.go.wait()
        if self.refuses:
            raise ValueError("no")

    async def collective_rpc(self, method: str, args: Any) -> list[list[str]]:
        return [[]]


@pytest.fixture
def adapter(vllm_engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An adapter that fits any base."""
    monkeypatch.setattr(vllm_engine, "check_base_files", lambda source, adapter: None)
    monkeypatch.setattr(
        vllm_engine, "Baker", lambda adapters: SimpleNamespace(adapters=adapters, rank=lambda: len(adapters))
    )
    return SimpleNamespace(alpha_range=(-1.0, 1.0), modules={})


def test_of_two_adapters_with_one_name_the_second_is_refused(vllm_engine: Any, adapter: Any) -> None:
    async def scenario() -> None:
        llm = Trying()
        llm.go.set()
        engine = engine_on(vllm_engine, llm)
        found = await asyncio.gather(*(engine.add_adapter("kind", adapter) for _ in range(2)), return_exceptions=True)
        assert found[0] is None
        assert isinstance(found[1], AdapterExistsError)
        assert list(engine.adapters) == ["kind"]

    asyncio.run(scenario())


@pytest.mark.parametrize("refuses", [False, True])
def test_no_request_may_name_an_adapter_before_vllm_has_taken_it(
    vllm_engine: Any, adapter: Any, tokenizer: Any, refuses: bool
) -> None:
    async def scenario() -> None:
        llm = Trying(refuses=refuses)
        engine = engine_on(vllm_engine, llm, tokenizer)
        adding = asyncio.ensure_future(engine.add_adapter("kind", adapter))
        await asyncio.wait_for(llm.asked.wait(), WAIT)
        assert not engine.adapters
        with pytest.raises(UnknownAdapterError):
            await anext(engine.generate(GenerationRequest([Row([5], {"kind": 1.0})], SamplingParams(max_tokens=1))))
        llm.go.set()
        if refuses:
            with pytest.raises(ConfigError, match="does not take the adapter 'kind': no"):
                await adding
        else:
            await adding
        assert list(engine.adapters) == ([] if refuses else ["kind"])
        assert list(engine._loras.adapters) == list(engine.adapters)

    asyncio.run(scenario())


def test_an_adapter_that_was_replaced_meanwhile_is_not_taken_for_the_one_that_was_asked_for(
    vllm_engine: Any, tokenizer: Any
) -> None:
    steer, other = {"kind": 1.0}, {"kind": "a"}

    async def scenario() -> None:
        engine = engine_on(vllm_engine, None, tokenizer)
        engine._loras.adapters["kind"] = SimpleNamespace(digest="b")
        with pytest.raises(UnknownAdapterError, match="unloaded meanwhile"):
            await engine.score(ScoreRequest([5, 6], ["Yes", "No"], [steer], other))
        with pytest.raises(UnknownAdapterError, match="unloaded meanwhile"):
            await anext(engine.generate(GenerationRequest([Row([5], steer)], SamplingParams(max_tokens=1), other)))
        assert not engine._requests.use("kind")

    asyncio.run(scenario())


def test_scores_that_are_not_finite_are_an_error(
    vllm_engine: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def overflown(llm: Any, context: Any, choices: Any, lora: Any) -> list[float]:
        return [math.nan if lora else -1.0 for _ in choices]

    monkeypatch.setattr(vllm_engine, "choice_logprobs", overflown)

    async def scenario(alpha: float) -> None:
        engine = engine_on(vllm_engine, None, tokenizer)
        engine._loras.adapters["kind"] = None
        engine._score_gate = Gate(4, 2)
        await engine.score(ScoreRequest([5, 6], ["Yes", "No"], [{}, {"kind": alpha}]))

    asyncio.run(scenario(0.0))
    with pytest.raises(ConfigError, match=r"At steer_alpha .* outgrow bfloat16; use an alpha nearer 0, or a server"):
        asyncio.run(scenario(9.0))
