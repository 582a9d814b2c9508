"""`ipissa-serve --engine vllm`: the same routes and the same answers as the torch engine."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SHIPPED
from servers import BIN, MODEL, VllmServed, lora_bytes, needs_vllm, ours, running
from serving import MESSAGES, Served, complete, in_thread, texts

import ipissa
from ipissa.data.prompts import load_prompts, spread

pytestmark = needs_vllm
ALPHAS = [-1.5, -0.5, 0.0, 0.75, 1.5]
PROMPT = "When I met my neighbour this morning, I"
KEY = "secret"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServed]:
    """The demo model and the shipped adapters on vLLM, with few places."""
    folder = tmp_path_factory.mktemp("ours")
    options = ("--dtype", "float32", "--max-loras", "3", "--max-queue", "40", "--max-cache-tokens", "16384")
    more = ("--adapter-dir", str(SHIPPED[0].parent), "--api-key", KEY)
    folder, command, settings = ours(folder, *options, *more)
    with running(folder, command, **settings) as server:
        server.http.headers["Authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture(scope="module")
def torch_served() -> Iterator[Served]:
    """The same on the torch engine."""
    adapters = {path.stem: path for path in SHIPPED}
    with in_thread(adapters=adapters, ui=False, device="cpu", dtype="float32", alpha_bucket=0.05) as server:
        server.http.timeout = 600
        yield server


def first_logprobs(answer: dict[str, Any]) -> list[float]:
    """The first token's log-probability of every choice."""
    return [choice["logprobs"]["token_logprobs"][0] for choice in answer["choices"]]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_greedy_text_and_first_logprobs_are_those_of_the_torch_engine(
    served: VllmServed, torch_served: Served, alpha: float
) -> None:
    prompts = spread(load_prompts(None)[0], 20)
    assert len(prompts) == 20
    found, expected = ([], [])
    for start in range(0, 20, 10):
        body = {"model": "kind", "prompt": prompts[start : start + 10], "max_tokens": 24, "logprobs": 1}
        found.append(complete(served, steer_alpha=alpha, **body))
        expected.append(complete(torch_served, steer_alpha=alpha, **body))
    for a, b in zip(found, expected, strict=True):
        assert first_logprobs(a) == pytest.approx(first_logprobs(b), abs=0.02)
        assert texts(a) == texts(b)


def test_zero_and_absent_are_the_base_exactly(served: VllmServed) -> None:
    answers = [
        complete(served, prompt=PROMPT, logprobs=3, **extra)["choices"][0]["logprobs"]
        for extra in ({}, {"model": "kind", "steer_alpha": 0}, {"steer_alpha": {"kind": 0, "honest": 0}})
    ]
    assert answers[0] == answers[1] == answers[2]


def test_compositions_are_those_of_the_torch_engine(served: VllmServed, torch_served: Served) -> None:
    body = {"prompt": PROMPT, "steer_alpha": [{"honest": 0.8, "kind": -0.9}, {"honest": -1.0, "kind": 2.0}]}
    here, there = (complete(server, logprobs=1, **body) for server in (served, torch_served))
    assert texts(here) == texts(there)
    assert first_logprobs(here) == pytest.approx(first_logprobs(there), abs=0.02)
    assert [choice["steer"] for choice in here["choices"]] == body["steer_alpha"]
    assert here["steer_adapters"] == there["steer_adapters"]


@pytest.mark.parametrize("choices", [["Yes", "No"], ["I tell everybody", "Nothing at all", "No"]])
def test_scores_are_those_of_the_torch_engine(served: VllmServed, torch_served: Served, choices: list[str]) -> None:
    body = {"model": "kind", "prompt": "You broke a cup. Do you tell?", "choices": choices, "steer_alpha": [-1, 0, 1]}
    here, there = (server.post("/v1/score", **body).json()["data"] for server in (served, torch_served))
    for a, b in zip(here, there, strict=True):
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=0.02)
        assert a["steer"] == b["steer"]


def test_alpha_is_rounded_to_twentieths_and_the_answer_says_so(served: VllmServed) -> None:
    answer = complete(served, model="kind", steer_alpha=[0.733, 0.75], logprobs=1)
    assert [choice["steer"] for choice in answer["choices"]] == [{"kind": 0.75}] * 2
    assert len(set(first_logprobs(answer))) == 1


def test_the_seed_fixes_the_noise_for_every_alpha(served: VllmServed) -> None:
    body = {"model": "kind", "prompt": PROMPT, "temperature": 1, "n": 2, "seed": 3, "max_tokens": 8}
    one, two, other = (texts(complete(served, steer_alpha=0.5, **(body | extra))) for extra in ({}, {}, {"seed": 4}))
    assert one == two != other
    assert one[0] != one[1]
    both = texts(complete(served, steer_alpha=[0.5, 0.5], **body))
    assert both[:2] == both[2:] == one


def test_echo_stops_and_logprobs_are_as_on_the_torch_engine(served: VllmServed, torch_served: Served) -> None:
    for body in (
        {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 2},
        {"prompt": PROMPT, "max_tokens": 4, "echo": True},
        {"prompt": "One, two, three, four,", "stop": [" six"]},
        {"prompt": PROMPT, "logit_bias": {"500": 100}, "max_tokens": 3},
    ):
        here, there = (
            complete(server, model="kind", steer_alpha=1, **body)["choices"][0] for server in (served, torch_served)
        )
        assert here["text"] == there["text"]
        assert here["finish_reason"] == there["finish_reason"]
        if here["logprobs"]:
            assert here["logprobs"]["tokens"] == there["logprobs"]["tokens"]
            pairs = zip(here["logprobs"]["top_logprobs"], there["logprobs"]["top_logprobs"], strict=True)
            assert all(a is b is None or a == pytest.approx(b, abs=0.02) for a, b in pairs)


def test_streams_say_what_whole_answers_say(served: VllmServed) -> None:
    settings: dict[str, Any] = {"model": "kind", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    client = served.openai.with_options(api_key=KEY)
    settings["extra_body"] = {"steer_alpha": [-1, 1]}
    whole = [choice.message.content for choice in client.chat.completions.create(**settings).choices]
    parts = ["", ""]
    for chunk in client.chat.completions.create(stream=True, **settings):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == whole


def test_many_settings_at_once_have_their_own_steering(served: VllmServed) -> None:
    """12 clients with 12 α, of which 3 fit in a batch, and scores among them."""
    alphas = [alpha / 10 for alpha in range(-30, 30, 5)]

    def ask(alpha: float) -> Any:
        return complete(served, model="kind", prompt=PROMPT, steer_alpha=alpha, logprobs=2)["choices"][0]

    def score(alpha: float) -> Any:
        return served.post("/v1/score", model="honest", prompt=PROMPT, steer_alpha=alpha).json()["data"][0]["log_odds"]

    alone = [ask(alpha) for alpha in alphas], [score(alpha) for alpha in alphas[:4]]
    with ThreadPoolExecutor(16) as pool:
        asked, scored = (
            [pool.submit(do, alpha) for alpha in some] for do, some in ((ask, alphas), (score, alphas[:4]))
        )
        together = [each.result() for each in asked], [each.result() for each in scored]
    assert [each["text"] for each in together[0]] == [each["text"] for each in alone[0]]
    for one, other in zip(together[0], alone[0], strict=True):  # a score in the batch must not change what is told
        for a, b in zip(one["logprobs"]["top_logprobs"], other["logprobs"]["top_logprobs"], strict=True):
            assert a == pytest.approx(b, abs=0.01)
    assert together[1] == pytest.approx(alone[1], abs=0.01)


def test_prefixes_are_never_shared_between_two_alphas(served: VllmServed, torch_served: Served) -> None:
    prompt = " ".join(f"On day {i} I told my neighbour a story." for i in range(40)) + " Then I"
    body = {"model": "kind", "prompt": prompt, "max_tokens": 1, "logprobs": 1}
    expected = {alpha: first_logprobs(complete(torch_served, steer_alpha=alpha, **body))[0] for alpha in (2, -2, 0)}
    assert min(abs(expected[a] - expected[b]) for a, b in ((2, -2), (2, 0), (-2, 0))) > 0.02
    for alpha, logprob in [*expected.items(), *expected.items()]:
        assert first_logprobs(complete(served, steer_alpha=alpha, **body))[0] == pytest.approx(logprob, abs=0.005)


def test_a_client_that_hangs_up_frees_its_places(served: VllmServed) -> None:
    body = {"model": "kind", "prompt": PROMPT, "max_tokens": 900, "steer_alpha": [0.5, 1], "stream": True}
    body["logit_bias"] = {0: -100, 2: -100}  # neither row may end by itself
    with served.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: a dropped iterator closes the connection
        next(lines)
        assert served.metric("ipissa_active_rows") == 2
    deadline = time.monotonic() + 60
    while served.metric("ipissa_active_rows") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert served.metric("ipissa_active_rows") == served.metric("ipissa_queued_requests") == 0


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "kind", "steer_alpha": 11}, 400, "from -10 to 10"),
        ({"model": "kind", "steer_alpha": "much"}, 400, "not a finite number"),
        ({"steer_alpha": 0.5}, 400, "Loaded adapters: honest, kind"),
        ({"model": "cruel"}, 404, "does not exist"),
        ({"max_tokens": 5000}, 400, "exceed this model's limit of 1024"),
        ({"n": 17}, 400, "at most 16 in one request"),
    ],
)
def test_what_cannot_be_served_is_refused_as_on_the_torch_engine(
    served: VllmServed, body: dict[str, Any], status: int, says: str
) -> None:
    response = served.post("/v1/completions", **{"prompt": PROMPT, **body})
    assert response.status_code == status
    assert says in response.json()["error"]["message"]


def test_a_full_queue_is_answered_with_429(served: VllmServed) -> None:
    def ask(i: int) -> int:
        return served.post("/v1/completions", model="kind", prompt=PROMPT, max_tokens=8, steer_alpha=1).status_code

    with ThreadPoolExecutor(60) as pool:
        statuses = set(pool.map(ask, range(60)))
    assert statuses == {200, 429}


def test_adapters_come_and_go_while_the_server_runs(served: VllmServed) -> None:
    added = served.post("/v1/adapters", name="again", path="kind.safetensors")
    assert added.status_code == 201, added.text
    one, other = (complete(served, model=name, steer_alpha=1.5, logprobs=1) for name in ("again", "kind"))
    assert first_logprobs(one) == first_logprobs(other)
    assert served.http.delete("/v1/adapters/again").status_code == 200
    assert served.post("/v1/completions", model="again", prompt=PROMPT).status_code == 404


def test_five_hundred_settings_leave_disk_and_memory_bounded(served: VllmServed) -> None:
    settings = [{"honest": a / 10, "kind": b / 10} for a in range(1, 26) for b in range(1, 21)]

    def turn(some: list[dict[str, float]]) -> None:
        for start in range(0, len(some), 10):
            complete(served, steer_alpha=some[start : start + 10], max_tokens=1)

    turn(settings[:100])
    before = served.memory()
    turn(settings[100:])
    assert served.stored() <= 64
    assert len(served.http.get("/v1/models").json()["data"]) == 1 + len(SHIPPED)
    assert served.memory() - before < 40 * lora_bytes()  # a leak would keep 400


def test_what_vllm_cannot_take_is_refused_at_start_with_the_reason(tmp_path: Path) -> None:
    adapter = ipissa.load_adapter(SHIPPED[1])
    name, other = adapter.config.modules[0], "model.layers.6.self_attn"
    modules = {other if module == name else module: factors for module, factors in adapter.modules.items()}
    config = replace(adapter.config, modules=tuple(modules))
    ipissa.save_adapter(replace(adapter, modules=modules, config=config), tmp_path / "odd.safetensors")
    odd = refusal("--adapter", str(tmp_path / "odd.safetensors"))
    assert f"adapts {other} as a linear layer, which this model lacks" in odd
    half = refusal("--vllm", "lora_target_modules=[down_proj]", "--max-cache-tokens", "4096")
    assert "the adapter 'kind': no LoRA reaches 21 of its layers, such as model.layers.10.self_attn.o_proj" in half
    small = refusal("--vllm", "max_lora_rank=8")
    assert f"have rank {adapter.config.rank}, more than max_lora_rank 8" in small
    assert "vLLM has no engine option 'loras'" in refusal("--vllm", "loras=8")
    assert "'dtype' is set by ipissa-serve; leave it out or use --dtype." in refusal("--vllm", "dtype=half")
    assert "The model 'nowhere' cannot be loaded" in refusal("--model", "nowhere")


def refusal(*arguments: str) -> str:
    """The one error of a server that does not start."""
    command = [str(BIN / "ipissa-serve"), "--engine", "vllm", "--model", MODEL, "--no-ui", "--max-model-len", "256"]
    command += [] if "--adapter" in arguments else ["--adapter", str(SHIPPED[1])]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1
    assert not re.search(r"^Traceback", done.stderr, re.MULTILINE)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    return error
