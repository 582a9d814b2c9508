"""The plugin under stock `vllm serve`: every setting is a model name, and endless series of them leave no trace."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import SHIPPED
from servers import BIN, MODEL, VllmServed, lora_bytes, needs_vllm, running, stock

import ipissa
from ipissa.models import model_source

pytestmark = needs_vllm
PROMPT = "When I met my neighbour this morning, I"
TOKENS = 16
CAPACITY = 4


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServed]:
    """`vllm serve` with room for few settings, so that they come and go; α is exact to a thousandth."""
    folder = tmp_path_factory.mktemp("stock")
    options = ("--max-loras", "2", "--max-cpu-loras", "2")
    environment = {"IPISSA_ALPHA_BUCKET": "0.001", "IPISSA_LORA_CAPACITY": str(CAPACITY)}
    folder, command, settings = stock(folder, model_source(MODEL), *options, **environment)
    with running(folder, command, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def steered(demo: tuple[Any, Any]) -> Iterator[ipissa.SteeredModel]:
    """The same model and adapters in this process."""
    handle = ipissa.attach(demo[0], {path.stem: ipissa.load_adapter(path) for path in SHIPPED})
    yield handle
    handle.detach()


def ask(served: VllmServed, model: str, prompt: str = PROMPT, **body: Any) -> dict[str, Any]:
    """A greedy completion with the likeliest tokens."""
    settings = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 3, **body}
    response = served.post("/v1/completions", **settings)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def first(choice: dict[str, Any]) -> float:
    """The first token's log-probability."""
    return choice["logprobs"]["token_logprobs"][0]


def runtime(steered: ipissa.SteeredModel, tokenizer: Any, steer: dict[str, float], prompt: str) -> tuple[str, float]:
    """Greedy text and the first token's log-probability, by the library."""
    ids = tokenizer(prompt, return_tensors="pt")
    with steered.alpha(steer), torch.no_grad():
        logprob = steered.model(**ids).logits[0, -1].log_softmax(-1).max()
        out = steered.model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.input_ids.shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True), float(logprob)


@pytest.mark.parametrize(
    ("name", "steer"),
    [
        ("kind@-1.5", {"kind": -1.5}),
        ("kind@0.75", {"kind": 0.75}),
        ("kind@0.7501", {"kind": 0.75}),
        ("honest@2.5", {"honest": 2.5}),
        ("kind@-0.9+honest@0.8", {"honest": 0.8, "kind": -0.9}),
        ("honest@0.0002", {}),
    ],
)
def test_a_name_with_an_alpha_is_the_model_at_that_alpha(
    served: VllmServed, steered: ipissa.SteeredModel, tokenizer: Any, name: str, steer: dict[str, float]
) -> None:
    text, logprob = runtime(steered, tokenizer, steer, PROMPT)
    choice = ask(served, name)
    assert choice["text"] == text
    assert first(choice) == pytest.approx(logprob, abs=0.02)


def test_zero_is_the_base_exactly_and_the_answer_names_the_alpha_applied(served: VllmServed) -> None:
    assert ask(served, "kind@0")["logprobs"] == ask(served, MODEL)["logprobs"]
    body = {"prompt": PROMPT, "max_tokens": 1}
    assert served.post("/v1/completions", model="kind@0.7501", **body).json()["model"] == "kind@0.75"


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("kind@nan", 400, "α out of range; write the adapter and a number from -10 to 10"),
        ("kind@10.5", 400, "out of range"),
        ("kind", 400, "no α that is a number"),
        ("kind@1+cruel@1", 400, "names the adapter 'cruel'"),
        ("cruel@1", 404, "does not exist"),
    ],
)
def test_what_is_no_setting_is_refused_in_openais_form(served: VllmServed, name: str, status: int, says: str) -> None:
    response = served.post("/v1/completions", model=name, prompt=PROMPT)
    assert response.status_code == status
    assert says in response.json()["error"]["message"]


def test_chat_and_streams_take_the_same_names(served: VllmServed) -> None:
    messages = [{"role": "user", "content": "Tell me about your day."}]
    settings: dict[str, Any] = {"model": "kind@1.5", "messages": messages, "max_tokens": 8, "temperature": 0}
    whole = served.openai.chat.completions.create(**settings).choices[0].message.content
    stream = served.openai.chat.completions.create(stream=True, **settings)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_prefixes_are_shared_within_an_alpha_and_never_between_two(
    served: VllmServed, steered: ipissa.SteeredModel, tokenizer: Any
) -> None:
    """If one setting read another's keys and values, its first log-probability would be the other's mixture."""
    prompt = " ".join(f"On day {i} I told my neighbour a story." for i in range(40)) + " Then I"
    settings = {"kind@2": {"kind": 2.0}, "kind@-2": {"kind": -2.0}, "honest@3": {"honest": 3.0}, MODEL: {}}
    expected = {name: runtime(steered, tokenizer, steer, prompt)[1] for name, steer in settings.items()}
    values = sorted(expected.values())
    assert min(b - a for a, b in pairwise(values)) > 0.02  # or this would prove nothing
    fresh = set()
    for name, logprob in [*expected.items(), *expected.items()]:  # the second time in reach of everybody's prefix
        before = served.metric("vllm:prefix_cache_hits_total")
        assert first(ask(served, name, prompt, max_tokens=1)) == pytest.approx(logprob, abs=0.005)
        hits = served.metric("vllm:prefix_cache_hits_total") - before
        assert (hits > 0) == (name in fresh)
        fresh.add(name)


def test_requests_in_one_batch_have_their_own_alpha_even_when_more_wait_than_are_remembered(
    served: VllmServed,
) -> None:
    """12 settings at once, of which the engine runs 2 and the store remembers 4: workers bake the others again."""
    names = [f"kind@{alpha / 10 - 3}" for alpha in range(0, 60, 5)]
    alone = [ask(served, name)["text"] for name in names]
    assert len(set(alone)) > 4
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: ask(served, name)["text"], names))
    assert together == alone


def test_five_hundred_alphas_leave_models_disk_and_memory_bounded(served: VllmServed) -> None:
    def turn(alphas: range) -> None:
        for alpha in alphas:
            ask(served, f"kind@{alpha / 1000}", max_tokens=1)

    turn(range(1, 101))
    before = served.memory()
    turn(range(101, 501))
    assert [model["id"] for model in served.http.get("/v1/models").json()["data"]] == [MODEL]
    assert served.stored() <= CAPACITY
    assert served.memory() - before < 40 * lora_bytes()  # a leak would keep 400
    assert "kind@0.4" not in served.http.get("/metrics").text


def test_an_adapter_of_too_large_a_rank_keeps_the_server_from_starting(tmp_path_factory: Any) -> None:
    folder, command, settings = stock(tmp_path_factory.mktemp("small"), model_source(MODEL), "--max-lora-rank", "8")
    rank = ipissa.load_adapter(SHIPPED[0]).config.rank
    says = f"has rank {rank}, and this engine takes 8; raise --max-lora-rank"
    with pytest.raises(RuntimeError, match=says), running(folder, command, **settings):
        pass


def test_an_adapter_of_layers_that_take_no_lora_keeps_the_server_from_starting(tmp_path_factory: Any) -> None:
    options = ("--lora-target-modules", "down_proj")
    folder, command, settings = stock(tmp_path_factory.mktemp("half"), model_source(MODEL), *options)
    says = "no LoRA reaches 21 of its layers, such as model.layers.10.self_attn.o_proj"
    with pytest.raises(RuntimeError, match=says), running(folder, command, **settings):
        pass


def test_without_adapters_in_the_environment_vllm_is_as_it_was() -> None:
    script = (
        "import ipissa.vllm; ipissa.vllm.register(); from vllm.lora.resolver import LoRAResolverRegistry as registry; "
        "assert not registry.get_supported_resolvers()"
    )
    done = subprocess.run([BIN / "python", "-c", script], check=False, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
