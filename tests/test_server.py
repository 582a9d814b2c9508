"""The API on a tiny model: every route, every refusal, streaming, cancelling, overload."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import random_adapter, tiny_model
from serving import Served, in_thread

from ipissa.adapter import save_adapter

PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def tiny(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and two adapters for it."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "adapters").mkdir()
    for seed, name in enumerate(("honest", "kind", "third")):
        save_adapter(random_adapter(model, seed=seed), folder / "adapters" / f"{name}.safetensors")
    (folder / "adapters" / "honest.md").write_text("# honest\n")
    return folder


def settings_for(tiny: Path, *names: str, **more: Any) -> dict[str, Any]:
    adapters = {name: tiny / "adapters" / f"{name}.safetensors" for name in names}
    return {"model": str(tiny / "model"), "adapters": adapters, "ui": False, "device": "cpu", **more}


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Served]:
    with in_thread(**settings_for(tiny, "honest", "kind"), max_model_len=200, max_batch=16) as server:
        yield server


def complete(served: Served, **body: Any) -> dict[str, Any]:
    response = served.post("/v1/completions", **{"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


# --- steering ---------------------------------------------------------------------------------


def test_absent_alpha_and_zero_give_identical_text_and_logprobs(served: Served) -> None:
    absent = complete(served, logprobs=3)
    for zero in ({"model": "honest", "steer_alpha": 0}, {"steer_alpha": {"kind": 0.0, "honest": 0}}):
        found = complete(served, logprobs=3, **zero)
        assert [c["logprobs"] for c in found["choices"]] == [c["logprobs"] for c in absent["choices"]]
        assert texts(found) == texts(absent)
    assert texts(complete(served, model="honest", steer_alpha=1.0)) != texts(absent)


def test_a_sweep_gives_one_choice_per_alpha_then_per_n_in_the_order_asked(served: Served) -> None:
    answer = complete(served, model="honest", steer_alpha=[1.0, -1.0, 0], n=2)
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    assert [c["steer"]["honest"] for c in answer["choices"]] == [1.0, 1.0, -1.0, -1.0, 0.0, 0.0]
    for alpha, pair in zip([1.0, -1.0, 0], zip(*[iter(texts(answer))] * 2, strict=True), strict=True):
        alone = texts(complete(served, model="honest", steer_alpha=alpha))[0]
        assert pair == (alone, alone)


def test_adapters_compose_and_a_sweep_may_list_compositions(served: Served) -> None:
    both = {"honest": 0.8, "kind": -0.6}
    answer = complete(served, steer_alpha=[both, {"kind": -0.6}, {"honest": 0.8}])
    assert answer["choices"][0]["steer"] == both
    assert set(answer["steer_adapters"]) == {"honest", "kind"}
    assert len(set(texts(answer))) == 3
    assert texts(complete(served, steer_alpha=both))[0] == texts(answer)[0]


def test_alpha_is_bucketed_and_every_choice_says_what_was_applied(served: Served) -> None:
    answer = complete(served, model="kind", steer_alpha=[0.70004, 0.7, -0.0001])
    assert [c["steer"] for c in answer["choices"]] == [{"kind": 0.7}, {"kind": 0.7}, {"kind": 0.0}]
    assert texts(answer)[0] == texts(answer)[1]
    assert answer["steer_adapters"]["kind"] == served.app.state.engine.adapters["kind"].digest


def test_one_adapter_needs_no_name_and_takes_the_servers_default(tiny: Path) -> None:
    with in_thread(**settings_for(tiny, "honest"), default_alpha=0.5) as server:
        base = str(tiny / "model")
        for body in ({}, {"steer_alpha": 0.5}, {"model": base}, {"model": "honest"}):
            assert complete(server, **body)["choices"][0]["steer"] == {"honest": 0.5}
        assert complete(server, steer_alpha=0)["choices"][0]["steer"] == {"honest": 0.0}


def test_bucket_zero_is_exact_and_max_alpha_is_the_servers(tiny: Path) -> None:
    with in_thread(**settings_for(tiny, "honest"), alpha_bucket=0, max_alpha=2) as server:
        assert complete(server, steer_alpha=0.123456789)["choices"][0]["steer"] == {"honest": 0.123456789}
        error = server.post("/v1/completions", prompt="x", steer_alpha=2.1).json()["error"]
        assert error["message"].endswith("from -2 to 2.")


def test_a_seed_fixes_the_noise_for_every_alpha_and_every_request(served: Served) -> None:
    sampled = {"temperature": 1.0, "seed": 11, "max_tokens": 8}
    sweep = texts(complete(served, model="honest", steer_alpha=[0, 0, 1], **sampled))
    assert sweep[0] == sweep[1]
    assert sweep[2] == texts(complete(served, model="honest", steer_alpha=1, **sampled))[0]
    assert sweep[0] != texts(complete(served, model="honest", steer_alpha=0, **{**sampled, "seed": 12}))[0]
    several = texts(complete(served, n=3, **sampled))
    assert len(set(several)) == 3
    assert several[0] == sweep[0]


# --- OpenAI's fields --------------------------------------------------------------------------


def test_streaming_gives_the_same_text_as_not_streaming(served: Served) -> None:
    request: dict[str, Any] = {
        "model": "honest",
        "prompt": [PROMPT, "Where is the"],
        "max_tokens": 10,
        "temperature": 0,
        "extra_body": {"steer_alpha": [0.7, -0.7]},
    }
    whole = served.openai.completions.create(**request)
    streamed = [""] * 4
    reasons: list[str | None] = [None] * 4
    for chunk in served.openai.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert streamed == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunk.usage == whole.usage
    assert chunk.usage.completion_tokens == 40


def test_chat_answers_streams_and_reports_logprobs(served: Served) -> None:
    request: dict[str, Any] = {
        "model": "kind",
        "messages": MESSAGES,
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"steer_alpha": 0.7},
    }
    whole = served.openai.chat.completions.create(**request)
    chunks = list(served.openai.chat.completions.create(**request, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert whole.choices[0].steer == {"kind": 0.7}
    content = whole.choices[0].logprobs.content
    assert len(content) == 6
    assert all(entry.top_logprobs[0].logprob >= entry.logprob - 1e-6 for entry in content)
    streamed = [entry.logprob for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert streamed == [entry.logprob for entry in content]


def test_stop_strings_end_the_text_before_them_in_both_forms(served: Served) -> None:
    full = texts(complete(served, max_tokens=30))[0]
    stop = full[7:10]
    expected = full[: full.index(stop)]
    answer = complete(served, max_tokens=30, stop=stop)
    assert (texts(answer)[0], answer["choices"][0]["finish_reason"]) == (expected, "stop")
    stream = served.openai.completions.create(
        model="honest", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop, "never this"], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_token_prompts_equal_text_prompts(served: Served) -> None:
    ids = served.post("/tokenize", prompt=PROMPT).json()["tokens"]
    assert texts(complete(served, prompt=ids)) == texts(complete(served))
    assert texts(complete(served, prompt=[ids, ids])) == texts(complete(served)) * 2


def test_logit_bias_and_penalties_reach_the_sampler(served: Served) -> None:
    answer = complete(served, logit_bias={"500": 100}, logprobs=0)
    assert len(set(answer["choices"][0]["logprobs"]["tokens"])) == 1
    assert complete(served, logit_bias={"500": 100}, frequency_penalty=2, max_tokens=100) != answer


def test_tokenize_and_detokenize_round_trip(served: Served) -> None:
    found = served.post("/tokenize", prompt="Héllo wörld", add_special_tokens=False).json()
    assert served.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": "Héllo wörld"}
    assert found["count"] == len(found["tokens"])
    assert served.post("/tokenize", messages=MESSAGES).json()["count"] > 5


# --- score, models, adapters, operations ------------------------------------------------------


def test_score_gives_one_entry_per_alpha(served: Served) -> None:
    body = served.post("/v1/score", model="honest", messages=MESSAGES, steer_alpha=[-1, 0, 1]).json()
    assert [entry["steer"] for entry in body["data"]] == [{"honest": -1}, {"honest": 0}, {"honest": 1}]
    for entry in body["data"]:
        assert entry["log_odds"] == pytest.approx(entry["logprobs"]["Yes"] - entry["logprobs"]["No"])
    alone = served.post("/v1/score", model="honest", messages=MESSAGES, steer_alpha=1).json()["data"][0]
    assert alone["log_odds"] == pytest.approx(body["data"][2]["log_odds"], abs=1e-4)
    assert len({entry["log_odds"] for entry in body["data"]}) == 3


def test_score_takes_more_alphas_than_a_batch_and_any_choices(served: Served) -> None:
    alphas = [i / 20 - 1 for i in range(41)]
    body = served.post("/v1/score", model="kind", prompt="A or b?", steer_alpha=alphas, choices=["left turn", "right"])
    assert [entry["steer"]["kind"] for entry in body.json()["data"]] == pytest.approx(alphas)


def test_models_and_adapters_are_listed(served: Served, tiny: Path) -> None:
    models = {model.id: model for model in served.openai.models.list()}
    base = str(tiny / "model")
    assert {name: model.parent for name, model in models.items()} == {base: None, "honest": base, "kind": base}
    assert served.openai.models.retrieve("kind").parent == base
    honest, kind = served.http.get("/v1/adapters").json()["data"]
    assert honest["alpha_range"] == [-1, 1]
    assert honest["config"]["rank"] == 6
    assert (honest["card"], kind["card"]) == ("# honest\n", None)
    assert len(honest["digest"]) == 64


def test_operators_routes(served: Served) -> None:
    complete(served, model="honest", steer_alpha=0.3)
    assert served.http.get("/health").json()["status"] == "ok"
    assert served.http.get("/version").json()["version"]
    metrics = served.http.get("/metrics").text
    assert 'ipissa_requests_total{route="/v1/completions",status="200"}' in metrics
    assert 'ipissa_phase_cache_misses_total{adapter="honest"}' in metrics
    paths = served.http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/score", "/v1/adapters"} <= paths.keys()


def test_adapters_change_only_with_key_and_folder(tiny: Path) -> None:
    with in_thread(**settings_for(tiny, "honest")) as server:
        assert server.post("/v1/adapters", name="kind", path="kind.safetensors").status_code == 403
        assert server.http.delete("/v1/adapters/honest").status_code == 403
    managed = settings_for(tiny, "honest", adapter_dir=tiny / "adapters", api_key="secret")
    with in_thread(**managed) as server:
        assert server.post("/v1/adapters", name="kind", path="kind.safetensors").status_code == 401
        server.http.headers["Authorization"] = "Bearer secret"
        assert server.post("/v1/adapters", name="kind", path="kind.safetensors").json()["id"] == "kind"
        assert complete(server, model="kind", steer_alpha=1)["choices"][0]["steer"] == {"kind": 1}
        assert server.post("/v1/adapters", name="kind", path="kind.safetensors").status_code == 409
        assert server.post("/v1/adapters", name="x", path="../model/config.json").status_code == 400
        assert server.post("/v1/adapters", name="x", path="missing.safetensors").status_code == 400
        assert server.http.delete("/v1/adapters/kind").json()["deleted"] is True
        assert server.http.delete("/v1/adapters/kind").status_code == 404
        assert server.post("/v1/completions", prompt="x", model="kind").status_code == 404


def test_an_empty_api_key_is_refused() -> None:
    from ipissa_server.settings import Settings

    from ipissa.errors import ConfigError

    with pytest.raises(ConfigError, match="would let everybody in"):
        Settings(api_key=" ")


def test_an_api_key_guards_v1_and_leaves_health_open(tiny: Path) -> None:
    with in_thread(**settings_for(tiny, "honest"), api_key="secret") as server:
        error = server.post("/v1/completions", prompt="x").json()["error"]
        assert error["code"] == "invalid_api_key"
        assert server.http.get("/health").status_code == 200
        keyed = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        assert keyed.completions.create(model="honest", prompt="x", max_tokens=1).choices
        keyed.close()


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"steer_alpha": "big", "model": "kind"}, 400, "steer_alpha", "'big' is not a finite number"),
        ({"steer_alpha": True, "model": "kind"}, 400, "steer_alpha", "True is not a finite number"),
        ({"steer_alpha": 1e9, "model": "kind"}, 400, "steer_alpha", "from -10 to 10"),
        ({"steer_alpha": [0.1, None], "model": "kind"}, 400, "steer_alpha", "None is not a finite number"),
        ({"steer_alpha": {"kind": False}}, 400, "steer_alpha", "False is not a finite number"),
        ({"steer_alpha": []}, 400, "steer_alpha", "empty list"),
        ({"steer_alpha": {}}, 400, "steer_alpha", "empty object"),
        ({"steer_alpha": 0.5}, 400, "steer_alpha", "Loaded adapters: honest, kind"),
        ({"steer_alpha": {"cruel": 1}}, 404, "steer_alpha", "'cruel' does not exist"),
        ({"model": "gpt-4"}, 404, "model", "'gpt-4' does not exist"),
        ({"best_of": 3}, 400, "best_of", "best_of is not supported"),
        ({"echo": True}, 400, "echo", "echo is not supported"),
        ({"steer_alfa": 1}, 400, "steer_alfa", "not a field this server knows"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"prompt": ""}, 400, "prompt", "prompt is empty"),
        ({"prompt": [99999999]}, 400, None, "99999999 is not in the vocabulary"),
        ({"prompt": "word " * 300}, 400, "prompt", "exceed this model's limit of 200"),
        ({"max_tokens": 500}, 400, "max_tokens", "exceed this model's limit of 200"),
        ({"n": 17}, 400, None, "at most 16 in one request"),
        ({"stream_options": {"include_usage": True}}, 400, None, "only for stream"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "at most 4"),
        ({"steer_alpha": 10**400, "model": "kind"}, 400, "steer_alpha", "not a finite number"),
        ({"model": "honest", "steer_alpha": {"kind": 1, "cruel": 1}}, 404, "steer_alpha", "'cruel' does not exist"),
    ],
)
def test_what_cannot_be_served_is_refused_in_openais_form(
    served: Served, body: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    response = served.post("/v1/completions", **{"prompt": "Hello", **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_half_a_surrogate_pair_is_refused(served: Served) -> None:
    raw = '{"prompt": "\\ud800"}'
    response = served.http.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "valid Unicode" in response.json()["error"]["message"]


def test_a_default_alpha_needs_to_know_its_adapter(tiny: Path) -> None:
    with in_thread(**settings_for(tiny, "honest", "kind"), default_alpha=0.5) as server:
        assert complete(server, model="kind")["choices"][0]["steer"] == {"kind": 0.5}
        refused = server.post("/v1/completions", prompt="x")
        assert refused.status_code == 400
        assert "Loaded adapters: honest, kind" in refused.json()["error"]["message"]


@pytest.mark.parametrize("raw", ['{"prompt": "x", "model": "kind", "steer_alpha": NaN}', '{"prompt": ', "[]", ""])
def test_bodies_that_are_not_json_objects_or_hold_nan_are_refused(served: Served, raw: str) -> None:
    response = served.http.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_unknown_routes_and_methods_are_openai_errors(served: Served) -> None:
    assert served.http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert "error" in served.http.get("/v1/completions").json()


def test_harmless_values_of_unsupported_fields_are_accepted(served: Served) -> None:
    assert complete(served, best_of=1, echo=False, suffix=None, user="me")["choices"]


@pytest.mark.parametrize(
    "body", [{}, {"prompt": "x", "messages": MESSAGES}, {"prompt": "x", "choices": ["Yes"]}, {"messages": []}]
)
def test_unusable_score_requests_are_refused(served: Served, body: dict[str, Any]) -> None:
    assert served.post("/v1/score", **body).status_code == 400


# --- under load -------------------------------------------------------------------------------


def wait_for(condition: Any, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_hanging_up_frees_the_engine_streaming_or_not(served: Served) -> None:
    engine = served.app.state.engine
    long = {"prompt": PROMPT, "max_tokens": 190, "temperature": 1.0, "logit_bias": {"2": -100, "0": -100}}
    with served.http.stream("POST", "/v1/completions", json={**long, "stream": True}) as response:
        lines = response.iter_lines()  # kept: httpx hangs up when this is garbage
        next(lines)
        assert engine.stats()["active_rows"] == 1
    assert wait_for(lambda: engine.stats()["active_rows"] == 0, 2)
    tokens = engine.stats()["generated_tokens"]
    with pytest.raises(httpx.ReadTimeout):
        served.http.post("/v1/completions", json=long, timeout=0.1)
    assert wait_for(lambda: engine.stats()["active_rows"] == 0, 2)
    assert engine.stats()["generated_tokens"] - tokens < 190


def test_concurrent_requests_at_different_alphas_do_not_disturb_each_other(served: Served) -> None:
    alphas = [-1.0, -0.5, 0.0, 0.5, 1.0]
    alone = [texts(complete(served, model="honest", steer_alpha=alpha, max_tokens=40))[0] for alpha in alphas]
    found: dict[float, str] = {}

    def ask(alpha: float) -> None:
        found[alpha] = texts(complete(served, model="honest", steer_alpha=alpha, max_tokens=40))[0]

    threads = [threading.Thread(target=ask, args=(alpha,)) for alpha in alphas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[alpha] for alpha in alphas] == alone


def test_a_score_does_not_wait_behind_a_generation(served: Served) -> None:
    long = {"prompt": PROMPT, "max_tokens": 190, "stream": True, "logit_bias": {"2": -100, "0": -100}}
    with served.http.stream("POST", "/v1/completions", json=long) as response:
        lines = response.iter_lines()
        next(lines)
        assert served.post("/v1/score", model="honest", prompt="x", steer_alpha=0.1).status_code == 200
        assert served.app.state.engine.stats()["active_rows"] == 1
        assert sum(line.startswith("data: {") for line in lines) == 189


def test_a_full_queue_answers_429_and_says_when_to_come_back(tiny: Path) -> None:
    with in_thread(**settings_for(tiny, "honest"), max_queue=1) as server:
        body = {"prompt": PROMPT, "max_tokens": 4000, "stream": True, "logit_bias": {"2": -100, "0": -100}}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # kept: httpx hangs up when this is garbage
            next(lines)
            refused = server.post("/v1/score", prompt="x", steer_alpha=0.1)
            streamed = server.post("/v1/completions", prompt="x", stream=True)
        assert refused.status_code == streamed.status_code == 429
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"


def test_health_and_api_say_503_while_loading(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipissa_server import app as app_module

    release = threading.Event()
    load = app_module.load_engine
    monkeypatch.setattr(app_module, "load_engine", lambda *args: release.wait(30) and load(*args))
    monkeypatch.setattr(Served, "wait_until_ready", lambda self: None)
    with in_thread(**settings_for(tiny, "honest")) as server:

        def status(path: str) -> int | None:
            try:
                return server.http.get(path).status_code
            except httpx.TransportError:
                return None

        assert wait_for(lambda: status("/health") == 503)
        assert status("/v1/models") == 503
        release.set()
        assert wait_for(lambda: status("/health") == 200)


def test_an_unusable_adapter_is_refused_before_anything_is_served(tiny: Path, tmp_path: Path) -> None:
    from ipissa_server.cli import base_of, named_adapters

    from ipissa.errors import AdapterFileError, ConfigError

    shutil.copy(tiny / "adapters" / "honest.safetensors", tmp_path / "honest.safetensors")
    assert named_adapters([f"{tmp_path}/honest.safetensors", "b=x.safetensors"]).keys() == {"honest", "b"}
    with pytest.raises(ConfigError, match="twice"):
        named_adapters(["a=x", "a=y"])
    odd = tmp_path / "lr=1.safetensors"
    shutil.copy(tiny / "adapters" / "honest.safetensors", odd)
    assert named_adapters([str(odd), f"h={odd}"]) == {"lr=1": odd, "h": odd}
    with pytest.raises(AdapterFileError):
        base_of({"x": tmp_path / "nowhere.safetensors"})


def test_error_bodies_are_json_even_for_a_stream(served: Served) -> None:
    response = served.post("/v1/completions", prompt="x", model="kind", steer_alpha=99, stream=True)
    assert response.status_code == 400
    assert json.loads(response.text)["error"]["param"] == "steer_alpha"
