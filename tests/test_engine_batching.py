"""A busy mixed batch changes nothing for anybody: every stream is what it is alone."""

from __future__ import annotations

import asyncio
import gc
import random
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import NAMES, engine_for, run
from ipissa_server.engine.base import (
    AdapterInUseError,
    GenerationRequest,
    OverloadedError,
    Row,
    SamplingParams,
    ScoreRequest,
    Steer,
    UnknownAdapterError,
)
from ipissa_server.engine.cache import SlotCache
from ipissa_server.engine.pace import Pace
from ipissa_server.engine.scheduler import Scheduler
from ipissa_server.engine.sequence import Job, Sequence
from ipissa_server.engine.torch_engine import TorchEngine

import ipissa
from ipissa.evaluate.scoring import find_choices, score_choices

MIXES = 200


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Any:
    """The tiny model with both adapters and no engine: one row, one pass, no cache."""
    model, _ = ipissa.load_model(str(tiny / "model"), device="cpu", dtype="float32")
    adapters = {name: ipissa.load_adapter(tiny / "adapters" / f"{name}.safetensors") for name in NAMES}
    steered = ipissa.attach(model, adapters)

    def logprobs(ids: list[int], steer: Steer) -> torch.Tensor:
        with steered.alpha(steer), torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)

    yield logprobs
    steered.detach()


def random_request(rng: random.Random) -> GenerationRequest:
    """One prompt or two, one α or several, any adapters, greedy."""
    texts = [
        [rng.randrange(3, 900) for _ in range(rng.choice([1, 2, 7, 20, 45]))] for _ in range(rng.choice([1, 1, 2]))
    ]

    def steer() -> Steer:
        names = rng.choice([(), ("honest",), ("kind",), NAMES])
        return {name: rng.choice([-1.3, -0.5, 0.0, 0.37, 1.0]) for name in names}

    steers = [steer() for _ in range(rng.choice([1, 1, 3]))]
    rows = [Row(text, setting) for text in texts for setting in steers for _ in range(rng.choice([1, 1, 2]))]
    sampling = SamplingParams(
        max_tokens=rng.randrange(1, 25),
        temperature=0,
        top_logprobs=rng.choice([0, 2]),
        echo=rng.random() < 0.2,
        frequency_penalty=0.0,
    )
    return GenerationRequest(rows, sampling)


def check_against(alone: Any, request: GenerationRequest, found: list[list[Any]], end_ids: set[int]) -> None:
    """By induction over tokens: each is what a plain pass over the tokens before it finds likeliest."""
    for row, entries in zip(request.rows, found, strict=True):
        if not request.sampling.echo:
            entries = [None] * len(row.prompt_ids) + entries
        ids = row.prompt_ids + [entry.token_id for entry in entries[len(row.prompt_ids) :]]
        written = len(ids) - len(row.prompt_ids)
        assert written == request.sampling.max_tokens or ids[-1] in end_ids
        expected = alone(ids, row.steer)
        for i in range(1, len(ids)):
            if entries[i] is None:
                continue
            assert entries[i].token_id == ids[i]
            assert entries[i].logprob == pytest.approx(float(expected[i - 1, ids[i]]), abs=1e-3)
            if i >= len(row.prompt_ids):
                assert ids[i] == int(expected[i - 1].argmax())
            for token, value in entries[i].top:
                assert value == pytest.approx(float(expected[i - 1, token]), abs=1e-3)


def test_every_stream_in_a_busy_mixed_batch_is_what_it_is_alone(
    tiny: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    monkeypatch.setattr(Pace, "tokens", lambda self, decoding: rng.randrange(1, 60))  # chunks of every size
    evicted: list[Sequence] = []
    grow = Scheduler.grow
    monkeypatch.setattr(Scheduler, "grow", lambda self: [evicted.append(each) for each in grow(self)])

    async def mix(engine: TorchEngine) -> None:
        requests = [random_request(rng) for _ in range(rng.randrange(2, 7))]

        async def arrive(request: GenerationRequest) -> list[list[Any]]:
            await asyncio.sleep(rng.random() * 0.02)
            return await run(engine, request)

        async with asyncio.timeout(60):
            found = await asyncio.gather(*map(arrive, requests))
        for request, rows in zip(requests, found, strict=True):
            check_against(alone, request, rows, engine._worker._end_ids)

    # Few slots and little memory: requests queue, join, leave, and lose their slots.
    with engine_for(tiny, max_batch=14, max_cache_tokens=14 * 40, max_model_len=100) as engine:
        for _ in range(MIXES):
            asyncio.run(mix(engine))
        assert engine.stats()["active_rows"] == engine.stats()["queued"] == 0
    assert evicted


def test_clients_that_leave_at_random_leave_nothing_behind(tiny: Path) -> None:
    rng = random.Random(1)

    async def leave(engine: TorchEngine) -> None:
        request = random_request(rng)
        patience = rng.choice([0, 1, 2, 5])
        await asyncio.sleep(rng.random() * 0.3)
        async with aclosing(engine.generate(request)) as steps:  # type: ignore[type-var]
            if not patience:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(steps), timeout=1e-4)
                return
            for _ in range(patience):
                if await anext(steps, None) is None:
                    return

    async def everybody(engine: TorchEngine) -> int:
        await asyncio.gather(*(leave(engine) for _ in range(300)))
        for _ in range(200):
            if not engine.stats()["active_rows"] and not engine.stats()["queued"]:
                break
            await asyncio.sleep(0.02)
        return len(asyncio.all_tasks()) - 1

    with engine_for(tiny, max_batch=32, max_queue=300, max_model_len=100) as engine:
        tasks_left = asyncio.run(everybody(engine))
        assert tasks_left == 0
        assert engine.stats()["active_rows"] == engine.stats()["queued"] == len(engine._requests) == 0
        assert engine._worker._runner._cache._layers == {}
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each) in (Job, Sequence)]
        assert asyncio.run(run(engine, random_request(rng)))


def test_a_full_queue_refuses_and_a_leaving_client_makes_room(tiny: Path) -> None:
    request = GenerationRequest([Row([5, 6], {})], SamplingParams(max_tokens=90, temperature=0))

    async def main(engine: TorchEngine) -> None:
        first, second = engine.generate(request), engine.generate(request)
        await anext(first)
        with pytest.raises(OverloadedError, match="1 requests are waiting or running"):
            await anext(second)
        await first.aclose()
        assert await run(engine, request) is not None

    with engine_for(tiny, max_queue=1, max_model_len=100) as engine:
        asyncio.run(main(engine))


def test_a_short_prompt_does_not_wait_for_a_long_one_to_be_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "tokens", lambda self, decoding: 16)
    finished: list[str] = []

    async def ask(engine: TorchEngine, name: str, length: int) -> None:
        await run(engine, GenerationRequest([Row([7] * length, {"kind": 1.0})], SamplingParams(max_tokens=3)))
        finished.append(name)

    async def main(engine: TorchEngine) -> None:
        await asyncio.gather(ask(engine, "long", 900), ask(engine, "short", 30))

    with engine_for(tiny) as engine:
        asyncio.run(main(engine))
    assert finished == ["short", "long"]


def test_an_adapter_that_was_unloaded_fails_its_request_and_no_other(tiny: Path) -> None:
    def request(steer: Steer) -> GenerationRequest:
        return GenerationRequest([Row([5, 6], steer)], SamplingParams(max_tokens=20, temperature=0))

    async def main(engine: TorchEngine) -> list[Any]:
        first = engine.generate(request({"kind": 1.0}))
        await anext(first)
        with pytest.raises(AdapterInUseError):
            await engine.remove_adapter("kind")
        await engine.remove_adapter("honest")
        rest = asyncio.gather(run(engine, request({"honest": 1.0})), run(engine, request({})), return_exceptions=True)
        await first.aclose()
        return await rest

    with engine_for(tiny) as engine:
        gone, other = asyncio.run(main(engine))
    assert isinstance(gone, UnknownAdapterError)
    assert isinstance(other, list)


def test_an_adapter_that_was_replaced_meanwhile_is_not_taken_for_the_one_that_was_asked_for(tiny: Path) -> None:
    async def outcomes(engine: TorchEngine, digest: str) -> list[bool]:
        rows, sampling = [Row([5, 6], {"kind": 1.0})], SamplingParams(max_tokens=3)
        work = (
            run(engine, GenerationRequest(rows, sampling, {"kind": digest})),
            engine.score(ScoreRequest([5, 6], ["Yes", "No"], [{"kind": 1.0}], {"kind": digest})),
        )
        found = await asyncio.gather(*work, return_exceptions=True)
        return [isinstance(each, UnknownAdapterError) for each in found]

    with engine_for(tiny) as engine:
        own = engine.adapters["kind"].digest
        assert asyncio.run(outcomes(engine, own)) == [False, False]
        assert asyncio.run(outcomes(engine, engine.adapters["honest"].digest)) == [True, True]


def test_scores_in_one_batch_are_what_they_are_alone(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    monkeypatch.setattr(Pace, "tokens", lambda self, decoding: 50)
    model, tokenizer = ipissa.load_model(str(tiny / "model"), device="cpu", dtype="float32")
    adapters = {name: ipissa.load_adapter(tiny / "adapters" / f"{name}.safetensors") for name in NAMES}
    requests = [
        ScoreRequest(
            [rng.randrange(3, 900) for _ in range(rng.choice([1, 9, 30]))],
            rng.choice([["Yes", "No"], ["left turn", "right", "straight on"]]),
            [{"honest": alpha, "kind": 0.3} for alpha in (-1.0, 0.0, 0.7)] + [{}],
        )
        for _ in range(12)
    ]

    async def main(engine: TorchEngine) -> Any:
        busy = asyncio.ensure_future(run(engine, GenerationRequest([Row([5], {})], SamplingParams(max_tokens=60))))
        found = await asyncio.gather(*map(engine.score, requests))
        await busy
        return found

    with engine_for(tiny) as engine:
        found = asyncio.run(main(engine))
    steered = ipissa.attach(model, adapters)
    for request, scores in zip(requests, found, strict=True):
        choices = find_choices(tokenizer, request.choices)
        for steer, score in zip(request.steers, scores, strict=True):
            with steered.alpha(steer):
                (expected,) = score_choices(model, tokenizer, request.context_ids, choices, 1).tolist()
            assert list(score.logprobs.values()) == pytest.approx(expected, abs=1e-3)
            assert score.log_odds == pytest.approx(expected[0] - expected[1], abs=1e-3)


def test_shared_layers_run_once_per_text_and_the_rest_once_per_alpha(tiny: Path) -> None:
    """Counted at the layers themselves: rows that pass the first layer, and the first adapted one."""
    steers: list[Steer] = [{"honest": i / 10} for i in range(8)]
    rows: dict[int, int] = {0: 0, 2: 0}
    adapter = ipissa.load_adapter(tiny / "adapters" / "honest.safetensors")
    upper = tuple(name for name in adapter.modules if ".layers.2." in name or ".layers.3." in name)
    small = replace(
        adapter,
        config=replace(adapter.config, modules=upper),
        modules={name: adapter.modules[name] for name in upper},
    )
    engine = TorchEngine(str(tiny / "model"), {"honest": small}, device="cpu", dtype="float32")
    for index in rows:
        layer = engine._worker._steered.model.model.layers[index].self_attn

        def count(module: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            rows[index] += kwargs["hidden_states"].shape[0]

        layer.register_forward_hook(count, with_kwargs=True)

    async def main() -> None:
        await engine.score(ScoreRequest([5, 6, 7], ["Yes", "No"], steers))
        assert rows == {0: 1, 2: 8}
        request = GenerationRequest([Row([5, 6, 7, 8], steer) for steer in steers * 2], SamplingParams(max_tokens=1))
        await run(engine, request)
        assert rows == {0: 2, 2: 16}

    asyncio.run(main())
    engine.close()


def test_slots_have_no_gaps_and_follow_their_sequences() -> None:
    """Random admissions, promotions and retirements, against a cache that stores who is in which slot."""
    rng = random.Random(3)

    class Labels(SlotCache):
        def __init__(self) -> None:
            super().__init__(10**6)
            self.who: dict[int, Sequence] = {}

        def swap(self, a: int, b: int) -> None:
            self.who[a], self.who[b] = self.who[b], self.who[a]

        def copy(self, source: int, target: int) -> None:
            self.who[target] = self.who[source]

    cache = Labels()
    scheduler = Scheduler(cache, 12)
    loop = asyncio.new_event_loop()
    for _ in range(400):
        if rng.random() < 0.5:
            rows = [Row([4] * rng.randrange(2, 9), {}) for _ in range(rng.randrange(1, 4))]
            scheduler.waiting.append(Job(GenerationRequest(rows, SamplingParams(max_tokens=5)), loop).sequences)
        held = len(scheduler.running)
        scheduler.admit()
        cache.who |= {i: scheduler.running[i] for i in range(held, len(scheduler.running))}
        prefilling = scheduler.running[scheduler.decoding :]
        if prefilling and rng.random() < 0.7:
            scheduler.decode(rng.choice(prefilling))
        if scheduler.running and rng.random() < 0.6:
            scheduler.retire(rng.choice(scheduler.running))
        assert [each.slot for each in scheduler.running] == list(range(len(scheduler.running)))
        assert [cache.who[i] for i in range(len(scheduler.running))] == scheduler.running
    loop.close()
    assert scheduler.decoding > 0
