"""Score, models, adapters and the operator's routes."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import uvicorn
from ipissa_server import cli
from serving import MESSAGES, Served, complete, in_thread, settings_for


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


@pytest.mark.parametrize(
    ("route", "read", "body"),
    [
        ("/v1/score", "score._check_choices", {"prompt": "Is it?", "choices": ["Yes", "No"]}),
        ("/v1/completions", "completions._prompt_ids", {"prompt": "It is", "max_tokens": 2}),
    ],
)
def test_a_request_during_which_its_adapter_is_replaced_is_not_answered_by_the_other(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, route: str, read: str, body: dict[str, Any]
) -> None:
    module, _, name = read.partition(".")
    reading = importlib.import_module(f"ipissa_server.routes.{module}")
    as_ever = getattr(reading, name)
    with in_thread(**settings_for(tiny, "honest", adapter_dir=tiny / "adapters", api_key="secret")) as server:
        server.http.headers["Authorization"] = "Bearer secret"

        def replaced(*args: Any) -> Any:
            assert server.http.delete("/v1/adapters/honest").status_code == 200
            assert server.post("/v1/adapters", name="honest", path="kind.safetensors").status_code == 201
            return as_ever(*args)

        with monkeypatch.context() as patch:
            patch.setattr(reading, name, replaced)
            answer = server.post(route, model="honest", steer_alpha=1, **body)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "The adapter 'honest' was unloaded meanwhile."
        again = server.post(route, model="honest", steer_alpha=1, **body).json()
        assert again["steer_adapters"]["honest"] == server.app.state.engine.adapters["honest"].digest


def test_a_server_that_is_stopped_while_it_loads_has_nothing_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "SHUTDOWN_SECONDS", 0)
    closed: list[bool] = []
    for engine in (None, SimpleNamespace(close=lambda: closed.append(True))):
        served = SimpleNamespace(state=SimpleNamespace(engine=engine))
        asyncio.run(cli._Server(uvicorn.Config(served))._end_requests())  # type: ignore[arg-type]
        assert closed == ([] if engine is None else [True])


def test_an_api_key_that_is_empty_or_that_nobody_can_send_is_refused() -> None:
    from ipissa_server.settings import Settings

    from ipissa.errors import ConfigError

    with pytest.raises(ConfigError, match="would let everybody in"):
        Settings(api_key=" ")
    for key in ("sésame", "open\nsesame"):
        with pytest.raises(ConfigError, match="no header can carry"):
            Settings(api_key=key)


def test_an_api_key_guards_v1_and_leaves_health_open(tiny: Path) -> None:
    with in_thread(**settings_for(tiny, "honest"), api_key=" secret\n") as server:
        error = server.post("/v1/completions", prompt="x").json()["error"]
        assert error["code"] == "invalid_api_key"
        assert server.http.get("/health").status_code == 200
        keyed = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        assert keyed.completions.create(model="honest", prompt="x", max_tokens=1).choices
        keyed.close()


def test_a_training_run_beside_an_adapter_is_told(tiny: Path, tmp_path: Path) -> None:
    for name in ("calm", "broken", "long", "bare"):
        (tmp_path / f"{name}.safetensors").write_bytes((tiny / "adapters" / "honest.safetensors").read_bytes())
    for name in ("calm", "broken", "long"):
        (tmp_path / f"{name}.run").mkdir()
    (tmp_path / "calm.run" / "config.yaml").write_text("rank: 4\n")
    (tmp_path / "calm.run" / "history.csv").write_text("loss,kl,step\n2.5,nan,1\n1.0,,2\n0.5")
    (tmp_path / "calm.run" / "samples.md").write_text("## Samples é\n")
    (tmp_path / "long.run" / "history.csv").write_text("loss,step\n2.5,1,7\n")
    (tmp_path / "broken.run" / "config.yaml").write_bytes(b"\xff\xfe\xff")
    adapters = {name: tmp_path / f"{name}.safetensors" for name in ("calm", "broken", "long", "bare")}
    with in_thread(**{**settings_for(tiny), "adapters": adapters}) as server:
        listed = server.http.get("/v1/adapters").json()["data"]
        assert {each["id"]: each["has_run"] for each in listed} == {
            "calm": True,
            "broken": True,
            "long": True,
            "bare": False,
        }
        run = server.http.get("/v1/adapters/calm/run").json()
        assert run["history"] == [
            {"loss": 2.5, "kl": None, "step": 1.0},
            {"loss": 1.0, "kl": None, "step": 2.0},
            {"loss": 0.5, "kl": None, "step": None},
        ]
        assert (run["config"], run["layers"], run["samples"]) == ({"rank": 4}, [], "## Samples é\n")
        broken = server.http.get("/v1/adapters/broken/run")
        assert broken.status_code == 400
        assert "broken.run cannot be read" in broken.json()["error"]["message"]
        long = server.http.get("/v1/adapters/long/run")
        assert long.status_code == 400
        assert "more cells" in long.json()["error"]["message"]
        assert server.http.get("/v1/adapters/bare/run").json()["error"]["code"] == "run_not_found"
        assert server.http.get("/v1/adapters/nobody/run").json()["error"]["code"] == "adapter_not_found"
