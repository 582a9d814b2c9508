"""Under load: hanging up, concurrency, a full queue, loading."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import MESSAGES, PROMPT, Served, complete, in_thread, settings_for, texts


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


def test_tokenizing_is_off_the_event_loop_and_only_of_what_can_be_served(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = served.app.state.engine.tokenizer
    encode, calls = tokenizer.encode, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(asyncio._get_running_loop())
        return encode(*args, **kwargs)

    monkeypatch.setattr(tokenizer, "encode", watched)
    refused = served.post("/v1/completions", prompt=["many"] * 17)
    assert "make 17 sequences" in refused.json()["error"]["message"]
    assert served.post("/v1/chat/completions", messages=MESSAGES, n=17).status_code == 400
    assert calls == []
    complete(served, max_tokens=1)
    for path, body in (
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1}),
        ("/v1/score", {"prompt": "Is it?"}),
        ("/tokenize", {"prompt": "Is it?"}),
    ):
        assert served.post(path, **body).status_code == 200
    assert len(calls) >= 4
    assert set(calls) == {None}


def test_a_tokens_text_is_decoded_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    request: dict[str, Any] = {"echo": True, "logprobs": 20, "max_tokens": 4}
    first = complete(served, **request)
    tokenizer = served.app.state.engine.tokenizer
    decode, alone = tokenizer.decode, []

    def watched(ids: Any, **kwargs: Any) -> Any:
        alone.extend(ids if len(ids) == 1 and not kwargs else [])
        return decode(ids, **kwargs)

    monkeypatch.setattr(tokenizer, "decode", watched)
    assert complete(served, **request)["choices"] == first["choices"]
    assert alone == []


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


def test_a_stream_that_the_end_of_the_server_breaks_off_says_so_and_is_no_failure(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"prompt": PROMPT, "max_tokens": 190, "temperature": 1.0, "logit_bias": {"2": -100, "0": -100}}
    with (
        in_thread(**settings_for(tiny, "honest")) as server,
        server.http.stream("POST", "/v1/completions", json={**long, "stream": True}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.app.state.engine.close()
        rest = "\n".join(lines)
    assert "The server is shutting down." in rest
    assert "A stream failed" not in caplog.text
