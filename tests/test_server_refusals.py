"""What cannot be served is refused with OpenAI's errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ipissa_server.engine.torch_engine import TorchEngine
from serving import MESSAGES, Served, complete, in_thread, settings_for


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"steer_alpha": "big", "model": "kind"}, 400, "steer_alpha", "'big' is not a finite number; use a number"),
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
        ({"suffix": "end"}, 400, "suffix", "suffix is not supported"),
        ({"max_tokens": 0}, 400, None, "only for echo"),
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


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "messages", "exceed this model's limit of 200"),
        ({"max_completion_tokens": 500}, "max_completion_tokens", "max_completion_tokens 500 exceed this model's"),
        ({"max_tokens": 500}, "max_tokens", "max_tokens 500 exceed this model's limit of 200"),
    ],
)
def test_a_refused_chat_is_told_of_fields_that_it_has(
    served: Served, body: dict[str, Any], param: str, says: str
) -> None:
    response = served.post("/v1/chat/completions", **{"messages": MESSAGES, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert says in response.json()["error"]["message"]


def test_a_server_whose_engine_has_ended_says_so_on_every_route(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchEngine, "healthy", property(lambda self: False))
    for response in (
        served.http.get("/health"),
        served.http.get("/v1/models"),
        served.post("/v1/completions", prompt="x"),
        served.post("/v1/score", prompt="x"),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
        assert "restart it" in response.json()["error"]["message"]


def test_what_a_message_asks_for_beyond_its_text_is_refused(served: Served) -> None:
    for extra in ({"tool_calls": [{"id": "x"}]}, {"refusal": "No."}, {"annotations": [{}]}, {"colour": None}):
        messages = [{"role": "assistant", "content": "Hi.", **extra}]
        response = served.post("/v1/chat/completions", messages=messages)
        assert response.status_code == 400
        assert next(iter(extra)) in response.json()["error"]["message"]


def test_half_a_surrogate_pair_is_refused(served: Served) -> None:
    raw = '{"prompt": "\\ud800"}'
    response = served.http.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "valid Unicode" in response.json()["error"]["message"]


@pytest.mark.parametrize("depth", [50, 900, 950, 5000])
@pytest.mark.parametrize("field", ["steer_alpha", "metadata", "tools"])
def test_deeply_nested_bodies_are_refused(served: Served, field: str, depth: int) -> None:
    raw = f'{{"prompt": "x", "model": "kind", "{field}": {"[" * depth}{"]" * depth}}}'
    response = served.http.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert len(response.json()["error"]["message"]) < 200


def test_refusals_name_long_values_by_their_beginning(served: Served) -> None:
    for body in ({"steer_alpha": "x" * 10**5}, {"steer_alpha": {"x" * 10**5: 1}}, {"model": "x" * 10**5}):
        message = served.post("/v1/completions", prompt="x", **body).json()["error"]["message"]
        assert "'xxx" in message
        assert len(message) < 300


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
    assert complete(served, best_of=1, suffix=None, user="me")["choices"]


@pytest.mark.parametrize(
    "body", [{}, {"prompt": "x", "messages": MESSAGES}, {"prompt": "x", "choices": ["Yes"]}, {"messages": []}]
)
def test_unusable_score_requests_are_refused(served: Served, body: dict[str, Any]) -> None:
    assert served.post("/v1/score", **body).status_code == 400


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"choices": ["Yes", "no " * 100]}, "at most 64"),
        ({"choices": ["Yes", "x" * 10**6]}, "at most 1000 characters"),
        ({"prompt": "word " * 185, "choices": ["Yes", "far too many words " * 5]}, "after this prompt"),
    ],
)
def test_choices_that_are_too_long_are_refused_before_the_model_reads_them(
    served: Served, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(served.app.state.engine, "score", None)
    response = served.post("/v1/score", **{"prompt": "Is it?", "model": "honest", **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "choices")
    assert says in error["message"]
    assert len(error["message"]) < 300


def test_a_choice_without_tokens_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipissa_server.routes import score

    from ipissa.evaluate.scoring import Choice

    monkeypatch.setattr(score, "find_choices", lambda tokenizer, texts: [Choice(text, ((),)) for text in texts])
    response = served.post("/v1/score", prompt="Is it?", choices=["\u200b", "No"])
    assert response.status_code == 400
    assert "has no tokens in this model" in response.json()["error"]["message"]


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
