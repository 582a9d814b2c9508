"""What an engine does when memory ends, adapters come, slots are taken away, or it is told to stop."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_adapter, tiny_model
from engines import adapters_of, engine_for, run
from ipissa_server.engine import cache, worker
from ipissa_server.engine import scores as scoring
from ipissa_server.engine.base import (
    AdapterInUseError,
    GenerationRequest,
    OverloadedError,
    Row,
    SamplingParams,
    ScoreRequest,
)
from ipissa_server.engine.overflow import check_scores, overflow
from ipissa_server.engine.pace import Pace
from ipissa_server.engine.scheduler import Scheduler
from ipissa_server.engine.sequence import Job, Sequence
from ipissa_server.engine.torch_engine import TorchEngine

from ipissa.adapter import Adapter
from ipissa.errors import ConfigError
from ipissa.evaluate.scoring import ChoiceScore

WAIT = 60  # seconds; far more than anything here takes
SWEEP = [{"honest": i / 100} for i in range(200)]


def request(tokens: int, max_tokens: int = 3) -> GenerationRequest:
    return GenerationRequest(
        [Row([5, 6, 7] * tokens, {})], SamplingParams(max_tokens=max_tokens, temperature=0, logit_bias={2: -100})
    )


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty tokens per prefill or score call, so that there are many."""
    monkeypatch.setattr(Pace, "tokens", lambda self, decoding: 20)


async def within(seconds: float, condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


async def outcome(work: Any) -> Any:
    """The result, or the error."""
    try:
        return await asyncio.wait_for(work, WAIT)
    except Exception as error:
        return error


async def drained(stream: Any) -> None:
    async for _ in stream:
        pass


def test_requests_that_are_given_up_do_not_pile_up_behind_one_that_waits_for_slots(tiny: Path) -> None:
    async def scenario(engine: TorchEngine) -> None:
        stream = engine.generate(request(1, 3000))
        await anext(stream)
        waiting, *others = [asyncio.ensure_future(run(engine, request(1))) for _ in range(50)]
        await within(WAIT, lambda: len(engine._worker._scheduler.waiting) == 50)
        for other in others:
            other.cancel()
        await within(WAIT, lambda: engine.stats()["queued"] == 1)
        assert not waiting.done()
        await stream.aclose()
        await waiting

    with engine_for(tiny, max_batch=1) as engine:
        asyncio.run(scenario(engine))


@pytest.mark.parametrize("newcomer", [True, False])  # memory ends as somebody is admitted, or as a stream grows
def test_without_memory_for_the_cache_running_requests_fail_and_the_next_are_served(
    newcomer: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, armed = cache._resized, []

    def resized(old: torch.Tensor, slots: int, length: int) -> torch.Tensor:
        if armed:
            armed.clear()
            raise torch.OutOfMemoryError("no memory")
        return whole(old, slots, length)

    monkeypatch.setattr(cache, "_resized", resized)

    async def scenario(engine: TorchEngine) -> None:
        stream = engine.generate(request(1, 2000))
        await anext(stream)
        armed.append(True)
        if newcomer:
            assert isinstance(await outcome(run(engine, request(100))), torch.OutOfMemoryError)
        assert isinstance(await outcome(drained(stream)), torch.OutOfMemoryError)
        assert len((await run(engine, request(1)))[0]) == 0  # no log-probabilities were asked for
        assert len(await engine.score(ScoreRequest([5], ["Yes", "No"], [{}]))) == 1
        assert (engine.stats()["active_rows"], engine.stats()["queued"]) == (0, 0)

    with engine_for(tiny, max_model_len=4096) as engine:
        asyncio.run(scenario(engine))


def test_stopping_answers_everybody(tiny: Path, small_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SCORES_IN_TURN", 1)

    async def scenario(engine: TorchEngine) -> list[Any]:
        waiting = [
            asyncio.ensure_future(outcome(work))
            for work in (engine.score(ScoreRequest([5, 6, 7], ["Yes", "No"], SWEEP)), run(engine, request(1, 3000)))
        ]
        await within(WAIT, lambda: engine._worker._scoring and engine.stats()["active_rows"])
        waiting.append(asyncio.ensure_future(outcome(engine.score(ScoreRequest([5, 6], ["Yes", "No"], SWEEP)))))
        await within(WAIT, lambda: engine.stats()["queued"])
        await asyncio.to_thread(engine.close)
        return await asyncio.gather(*waiting)

    with engine_for(tiny) as engine:
        assert [type(each) for each in asyncio.run(scenario(engine))] == [OverloadedError] * 3


@pytest.mark.parametrize("together", [True, False])
def test_one_score_does_not_wait_for_a_sweep(together: bool, tiny: Path, small_steps: None) -> None:
    finished: list[int] = []

    async def ask(engine: TorchEngine, context: list[int], steers: list[dict[str, float]]) -> None:
        assert len(await engine.score(ScoreRequest(context, ["Yes", "No"], steers))) == len(steers)
        finished.append(len(steers))

    async def scenario(engine: TorchEngine) -> None:
        await engine.score(ScoreRequest([5], ["Yes", "No"], [{}]))  # the choices are found
        sweep = asyncio.ensure_future(ask(engine, [5, 6, 7], SWEEP))
        if not together:
            await within(WAIT, lambda: engine._worker._scoring)
        await asyncio.gather(*(ask(engine, context, SWEEP[:1]) for context in ([5, 6, 7], [5] * 9)), sweep)

    with engine_for(tiny) as engine:
        asyncio.run(scenario(engine))
    assert finished == [1, 1, len(SWEEP)]


def test_a_sweep_that_is_given_up_costs_no_more_calls(tiny: Path, small_steps: None) -> None:
    calls: list[int] = []

    async def scenario(engine: TorchEngine) -> None:
        runner = engine._worker._runner
        rest = runner.continue_from
        runner.continue_from = lambda hidden, steers, picks: (
            calls.append(len(steers)),
            rest(hidden, steers, picks),
        )[1]
        sweep = asyncio.ensure_future(engine.score(ScoreRequest([5, 6, 7], ["Yes", "No"], SWEEP)))
        other = asyncio.ensure_future(engine.score(ScoreRequest([8], ["Yes", "No"], SWEEP[:20])))
        await within(WAIT, lambda: calls)
        sweep.cancel()
        assert len(await other) == 20
        await within(WAIT, lambda: not engine._worker._scoring)

    with engine_for(tiny) as engine:
        asyncio.run(scenario(engine))
    assert sum(calls) < len(SWEEP)


def test_requests_may_arrive_while_those_that_wait_are_looked_through(tiny: Path) -> None:
    class Arriving(Job):
        """Somebody else's request comes as its sequences are looked at."""

        arrived = False

        @property
        def sequences(self) -> list[Sequence]:
            if not self.arrived:
                self.arrived = True
                mailbox.put(Job(request(1), self.loop))
            return self._sequences

        @sequences.setter
        def sequences(self, value: list[Sequence]) -> None:
            self._sequences = value

    async def scenario() -> None:
        mailbox.put(Arriving(request(1), asyncio.get_running_loop()))
        await engine.remove_adapter("kind")

    with engine_for(tiny) as engine:
        mailbox = engine._mailbox
        asyncio.run(scenario())
        assert set(engine.adapters) == {"honest"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_has_died_is_not_healthy_and_leaves_nobody_waiting(tiny: Path) -> None:
    async def scenario(engine: TorchEngine) -> None:
        await run(engine, request(1))
        assert engine.healthy
        engine._worker._scheduler.admit = dies
        waiting = [asyncio.ensure_future(outcome(run(engine, request(1)))) for _ in range(3)]
        scores = ScoreRequest([5], ["Yes", "No"], [{}])
        found = await asyncio.wait_for(asyncio.gather(*waiting), WAIT)
        found.append(await asyncio.wait_for(outcome(engine.score(scores)), WAIT))
        assert [type(each) for each in found] == [OverloadedError] * 4
        await within(WAIT, lambda: not engine.healthy)

    def dies() -> None:
        raise SystemExit

    with engine_for(tiny) as engine:
        asyncio.run(scenario(engine))


async def poisoned(engine: TorchEngine, slot: int) -> None:
    """Make what a running sequence holds in the cache overflow."""

    def poison() -> None:
        for tensors in engine._worker._runner._cache._layers.values():
            for tensor in tensors:
                tensor[slot].fill_(torch.nan)

    await engine._call(poison)


@pytest.mark.parametrize("reading", [False, True])  # its prompt, when it is given up; or writing, when it fails
def test_numbers_that_are_not_finite_fail_their_request_and_reach_nobody_else(
    reading: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reading:
        monkeypatch.setattr(Pace, "tokens", lambda self, decoding: 8)
    short = GenerationRequest([Row([5, 6, 7], {})], SamplingParams(6, temperature=0, top_logprobs=0))
    steered = GenerationRequest([Row([8] * 2000, {"kind": 0.5})], SamplingParams(3000, logit_bias={2: -100}))

    async def scenario(engine: TorchEngine) -> None:
        (alone,) = await run(engine, short)
        other = engine.generate(request(300, 3000))
        await anext(other)
        victim = asyncio.ensure_future(run(engine, steered if reading else replace(steered, rows=[Row([8], {})])))
        scheduler = engine._worker._scheduler
        await within(WAIT, lambda: len(scheduler.running) == 2 and scheduler.running[1].cached)
        await poisoned(engine, 1)
        if reading:
            victim.cancel()
        else:
            with pytest.raises(ConfigError, match="Without steering the numbers of the model outgrow float32"):
                await victim
        await within(WAIT, lambda: len(scheduler.running) == 1)
        (beside,) = await run(engine, short)
        assert [entry.token_id for entry in beside] == [entry.token_id for entry in alone]
        assert [entry.logprob for entry in beside] == pytest.approx([entry.logprob for entry in alone], abs=1e-3)
        assert len(scheduler.running) == 1
        await other.aclose()

    with engine_for(tiny, max_model_len=4096) as engine:
        asyncio.run(scenario(engine))


def test_scores_that_are_not_finite_fail_their_request_and_no_other(tiny: Path) -> None:
    model = tiny_model("llama", vocab_size=49152)
    adapter = random_adapter(model, suffixes=("layers.2.mlp.down_proj",), scale_mode="mult")
    wild = {name: replace(factors, delta_s=torch.full((6,), 12.0)) for name, factors in adapter.modules.items()}
    sweep, tame = ({"wild": 0.1}, {"wild": 10.0}), ({"wild": 0.1},)

    async def scenario(engine: TorchEngine) -> None:
        requests = [ScoreRequest([5, 6, 7], ["Yes", "No"], list(steers)) for steers in (sweep, tame)]
        failed, scored = await asyncio.gather(*map(engine.score, requests), return_exceptions=True)
        assert isinstance(failed, ConfigError)
        assert str(failed).startswith("At steer_alpha {'wild': 10.0} the numbers of the model outgrow float32")
        assert math.isfinite(scored[0].log_odds)

    with engine_for(tiny, {"wild": replace(adapter, modules=wild)}) as engine:
        asyncio.run(scenario(engine))


def test_a_choice_that_the_model_rules_out_is_no_overflow() -> None:
    score = ChoiceScore({"Yes": -math.inf, "No": -0.1}, -math.inf, 0.9)
    check_scores([score], [{}], torch.float32)
    for value in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="outgrow float32"):
            check_scores([score, replace(score, logprobs={"Yes": -1.0, "No": value})], [{}, {"kind": 1.0}], "float32")


@pytest.mark.parametrize(
    ("steer", "dtype", "says"),
    [
        ({"kind": 9.0}, torch.bfloat16, "bfloat16; use an alpha nearer 0, or a server with --dtype float32."),
        ({"kind": 9.0}, torch.float32, "float32; use an alpha nearer 0."),
        ({"kind": 0.0}, torch.float16, "float16; use a server with --dtype float32."),
        ({}, torch.float32, "float32; the model's files may be damaged."),
    ],
)
def test_what_is_advised_against_overflow_would_help(steer: dict[str, float], dtype: torch.dtype, says: str) -> None:
    assert str(overflow(steer, dtype)).endswith(says)


def of_layers(adapter: Adapter, *layers: int) -> Adapter:
    modules = {n: f for n, f in adapter.modules.items() if any(f".layers.{i}." in n for i in layers)}
    return replace(adapter, config=replace(adapter.config, modules=tuple(modules)), modules=modules)


def test_an_adapter_that_comes_during_a_sweep_does_not_change_it(tiny: Path, small_steps: None) -> None:
    """It moves the first steered layer down, while hidden states that are in use stopped higher up."""
    adapters = adapters_of(tiny)
    above = {"honest": of_layers(adapters["honest"], 2, 3)}

    async def sweep(engine: TorchEngine, *, add: bool) -> list[float]:
        scores = asyncio.ensure_future(engine.score(ScoreRequest([5, 6, 7], ["Yes", "No"], SWEEP)))
        if add:
            await within(WAIT, lambda: engine._worker._scoring)
            await engine.add_adapter("kind", adapters["kind"])
            assert not scores.done()
        return [score.log_odds for score in await scores]

    found = []
    for add in (False, True):
        with engine_for(tiny, above) as engine:
            found.append(asyncio.run(sweep(engine, add=add)))
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_an_adapter_that_a_waiting_score_names_stays_and_others_may_go(tiny: Path, small_steps: None) -> None:
    async def scenario(engine: TorchEngine) -> None:
        scores = asyncio.ensure_future(engine.score(ScoreRequest([5, 6, 7], ["Yes", "No"], SWEEP)))
        await within(WAIT, lambda: engine._worker._scoring)
        with pytest.raises(AdapterInUseError):
            await engine.remove_adapter("honest")
        await engine.remove_adapter("kind")
        assert len(await scores) == len(SWEEP)
        await engine.remove_adapter("honest")

    with engine_for(tiny) as engine:
        asyncio.run(scenario(engine))


def test_a_prompt_that_loses_its_slot_half_read_is_echoed_whole(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "tokens", lambda self, decoding: 1 if decoding else 8)
    half_read = []
    grow = Scheduler.grow

    def growing(self: Scheduler) -> Any:
        before = {sequence: len(sequence.prompt_logprobs) for sequence in self.running}
        evicted = grow(self)
        half_read.extend(before[sequence] for sequence in evicted)
        return evicted

    monkeypatch.setattr(Scheduler, "grow", growing)
    rng = random.Random(0)
    text = [
        rng.randrange(3, 900) for _ in range(1104)
    ]  # more chunks than the other stream has steps before it needs the room
    echo = GenerationRequest([Row(text, {})], SamplingParams(1, temperature=0, top_logprobs=0, echo=True))

    async def scenario(engine: TorchEngine) -> list[Any]:
        other = engine.generate(request(367, 300))
        await anext(other)

        rest = asyncio.ensure_future(drained(other))
        (entries,) = await run(engine, echo)
        await rest
        return entries

    with engine_for(tiny, max_batch=4, max_cache_tokens=2 * 1235, max_model_len=1600) as engine:
        entries = asyncio.run(scenario(engine))
    assert any(half_read), "no prompt was taken away half read, so nothing was tested"
    assert [entry.token_id for entry in entries[:-1]] == text


def test_score_calls_keep_to_the_pace_while_somebody_streams(tiny: Path, small_steps: None) -> None:
    calls: list[tuple[int, int]] = []

    async def scenario(engine: TorchEngine) -> None:
        runner = engine._worker._runner
        shared, rest = runner.shared_hidden_states, runner.continue_from
        runner.shared_hidden_states = lambda texts, width: (calls.append((len(texts), width)), shared(texts, width))[1]
        runner.continue_from = lambda hidden, steers, picks: (
            calls.append((len(steers), hidden.input_ids.shape[1])),
            rest(hidden, steers, picks),
        )[1]
        choices = [f"choice number {i}" for i in range(16)]
        await engine.score(ScoreRequest(list(range(3, 9)), choices, SWEEP[:3]))

    with engine_for(tiny) as engine:
        asyncio.run(scenario(engine))
    assert len(calls) > 8
    assert max(rows * width for rows, width in calls) <= 20


def test_scores_of_long_choices_have_as_few_logits_at_a_time_as_they_may(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SPOTS", 12)
    found: list[list[ChoiceScore]] = []
    picked: list[int] = []

    async def scenario(engine: TorchEngine) -> None:
        runner = engine._worker._runner
        rest = runner.continue_from
        runner.continue_from = lambda hidden, steers, picks: (
            picked.append(len(picks[0])),
            rest(hidden, steers, picks),
        )[1]
        for choices in (["so it is", "it is not so"], ["Yes", "No"]):
            found.append(await engine.score(ScoreRequest([5, 6, 7], choices, SWEEP[:40])))

    with engine_for(tiny) as engine:
        asyncio.run(scenario(engine))
    monkeypatch.setattr(scoring, "SPOTS", 10000)
    assert len(picked) > 20
    assert max(picked) <= 12
    together = found.copy()
    with engine_for(tiny) as engine:
        asyncio.run(scenario(engine))
    assert max(picked) > 12
    for one, other in zip([s for each in together for s in each], [s for each in found[2:] for s in each], strict=True):
        assert one.log_odds == pytest.approx(other.log_odds, abs=1e-4)


def test_an_adapter_after_which_nothing_is_known_of_shared_layers_is_taken_off_again(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = adapters_of(tiny)
    with engine_for(tiny, {"honest": of_layers(adapters["honest"], 2, 3)}) as engine:
        runner = engine._worker._runner
        with monkeypatch.context() as patch:
            patch.setattr(runner._rehearsal, "fault", lambda staged, layer: "MemoryError: full")
            with pytest.raises(ConfigError, match="MemoryError: full"):
                asyncio.run(engine.add_adapter("kind", adapters["kind"]))
        assert list(engine.adapters) == ["honest"]
        assert runner.shared == 2
        asyncio.run(engine.add_adapter("kind", adapters["kind"]))
        assert (list(engine.adapters), runner.shared) == (["honest", "kind"], 0)


@pytest.fixture
def head_adapter(tiny: Path) -> Adapter:
    adapter = adapters_of(tiny)["honest"]
    name = next(iter(adapter.modules))
    model = tiny_model("llama", vocab_size=49152)
    U, S, vh = torch.linalg.svd(model.lm_head.weight.detach(), full_matrices=False)
    r = adapter.modules[name].S.numel()
    factors = replace(adapter.modules[name], U=U[:, :r], S=S[:r], V=vh[:r].T)
    return replace(adapter, config=replace(adapter.config, modules=("lm_head",)), modules={"lm_head": factors})


def test_an_adapter_outside_the_decoder_layers_is_refused(tiny: Path, head_adapter: Adapter) -> None:
    with pytest.raises(ConfigError, match="lm_head, outside the decoder layers"), engine_for(tiny, {"h": head_adapter}):
        pass
    with engine_for(tiny) as engine:
        with pytest.raises(ConfigError, match="outside the decoder layers"):
            asyncio.run(engine.add_adapter("h", head_adapter))
        assert "h" not in engine.adapters


@pytest.mark.parametrize(
    ("asked", "cache_tokens", "says"),
    [
        (4097, 65536, "max_model_len 4097 is more than the 4096 tokens the model was made for"),
        (4096, 4095, "max_model_len 4096 is more than max_cache_tokens 4095"),
    ],
)
def test_a_length_that_is_not_to_be_had_is_refused(tiny: Path, asked: int, cache_tokens: int, says: str) -> None:
    with (
        pytest.raises(ConfigError, match=says),
        engine_for(tiny, {}, max_model_len=asked, max_cache_tokens=cache_tokens),
    ):
        pass


def test_a_length_that_the_cache_shortens_by_default_is_told(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with engine_for(tiny, {}, max_model_len=4096) as engine:
        assert engine.max_model_len == 4096
    with engine_for(tiny, {}) as engine:
        assert engine.max_model_len == 4096
    assert not caplog.records
    with engine_for(tiny, {}, max_cache_tokens=1000) as engine:
        assert engine.max_model_len == 1000
    assert "1000 tokens, as max_cache_tokens, where the model takes 4096" in caplog.text


def test_steps_are_timed_on_the_device_they_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for device in ("cpu", "cuda:1"):
        with Pace.on(torch.device(device)).decode():
            pass
    assert waited == [torch.device("cuda:1")]


def test_more_rows_than_slots_are_refused(tiny: Path) -> None:
    with engine_for(tiny, max_batch=2) as engine, pytest.raises(ConfigError, match="3 rows are more than the 2"):
        asyncio.run(run(engine, replace(request(1), rows=[Row([5], {})] * 3)))
