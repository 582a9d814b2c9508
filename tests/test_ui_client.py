"""The page's client against a real server with a tiny model, and the command that shows the page on its own."""

from __future__ import annotations

import ast
import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
from conftest import ROOT
from ipissa_ui.client import Client, ServerError
from ipissa_ui.tokens import Answer
from ipissa_ui.view import Steer
from serving import MESSAGES, Served, free_port, in_thread, settings_for, standalone

T = TypeVar("T")

SETTINGS = [{"honest": 0.7, "kind": -0.2}, {"honest": 0.0}]


def ask(url: str, work: Callable[[Client], Awaitable[T]]) -> T:
    """What `work` makes of a client of the server at `url`."""

    async def run() -> T:
        client = Client(url)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


async def whole(client: Client, served: Served, settings: list[Steer] = SETTINGS, **more: Any) -> list[Answer]:
    """All answers, at their end."""
    sampling = {"model": served.openai.models.list().data[0].id, "max_tokens": 12, "temperature": 0.9, "seed": 3}
    stream = client.chat("", MESSAGES, settings, **{**sampling, **more})
    return [answers async for answers in stream][-1]


def test_streamed_answers_are_those_of_the_api_token_by_token(served: Served) -> None:
    answers = ask(served.url, lambda client: whole(client, served))
    choices = served.post(
        "/v1/chat/completions", messages=MESSAGES, steer_alpha=SETTINGS, max_tokens=12, temperature=0.9, seed=3,
        logprobs=True, return_token_ids=True,
    ).json()["choices"]  # fmt: skip
    for answer, choice in zip(answers, choices, strict=True):
        assert answer.text == choice["message"]["content"]
        assert answer.ids == choice["token_ids"]
        logprobs = [each["logprob"] for each in choice["logprobs"]["content"]]
        assert sum(piece.logprob or 0.0 for piece in answer.pieces) == pytest.approx(sum(logprobs), abs=1e-4)


def test_an_answer_read_at_its_own_setting_is_as_likely_as_when_it_was_written(served: Served) -> None:
    async def both(client: Client) -> None:
        left, right = await whole(client, served)
        start = await client.tokenize("", messages=MESSAGES)
        read, _ = await client.read("", [[*start, *left.ids], [*start, *right.ids]], SETTINGS)
        for side, answer in enumerate((left, right)):
            here = answer.against([value for _, value in read[side][side][len(start) :]])
            for piece in here.pieces:
                assert piece.elsewhere == pytest.approx(piece.logprob, abs=1e-3)
            there = answer.against([value for _, value in read[side][1 - side][len(start) :]])
            assert max(abs(piece.change or 0.0) for piece in there.pieces) > 0.1

    ask(served.url, both)


def test_answers_readings_and_scores_tell_the_alpha_that_was_applied_where_the_server_rounds_it(served: Served) -> None:
    asked: list[Steer] = [{"honest": 0.12345}, {"honest": 0.0, "kind": -0.00012}]

    async def applied(client: Client) -> list[list[Steer]]:
        answers = await whole(client, served, asked)
        _, read = await client.read("", [[5, 6, 7]], asked)
        scores = await client.score("", "Is it?", "So:", ["Yes", "No"], asked)
        return [[answer.steer for answer in answers], read, [score.steer for score in scores]]

    told = ask(served.url, applied)
    assert told == [[{"honest": 0.123}, {"honest": 0.0, "kind": 0.0}]] * 3


def test_scores_are_those_of_the_api(served: Served) -> None:
    question = ("", "Is it?", "So:", ["Yes", "No", "Maybe"], SETTINGS)
    scores = ask(served.url, lambda client: client.score(*question))
    body = served.post(
        "/v1/score", messages=[{"role": "user", "content": "Is it?"}], prefix="So:", choices=["Yes", "No", "Maybe"],
        steer_alpha=SETTINGS,
    ).json()["data"]  # fmt: skip
    assert [score.steer for score in scores] == SETTINGS
    assert [score.log_odds for score in scores] == pytest.approx([entry["log_odds"] for entry in body])
    assert [score.choice_mass for score in scores] == pytest.approx([entry["choice_mass"] for entry in body])


@pytest.mark.parametrize(
    ("change", "says"),
    [({"max_tokens": 10**6}, "exceed this model's limit"), ({"model": "nobody"}, "The model 'nobody' does not exist")],
)
def test_refusals_are_told_in_the_servers_words(served: Served, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ServerError, match=says):
        ask(served.url, lambda client: whole(client, served, **change))


def test_an_adapter_that_is_gone_is_told_with_what_to_do_about_it(served: Served) -> None:
    with pytest.raises(ServerError, match=r"The adapter 'gone' does not exist; .* load this page again") as refused:
        ask(served.url, lambda client: client.score("", "Is it?", "So:", ["Yes", "No"], [{"gone": 0.5}]))
    assert refused.value.status == 404


def status_of(url: str) -> int | None:
    """What is wrong with the server, as a status."""
    wrong = ask(url, lambda client: client.health())
    return wrong and wrong.status


def test_a_server_that_is_not_there_is_told_in_words() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerError, match="does not answer"):
        ask(url, lambda client: client.adapters(""))
    assert status_of(url) == 502
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the request, and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        wrong = ask(url, lambda client: client.health())
        assert (wrong.status, str(wrong)) == (504, "The server did not answer within 5 seconds.")


def test_a_busy_server_is_told_in_words(tiny: Path) -> None:
    async def crowd(client: Client) -> list[Any]:
        asked = (whole(client, served, max_tokens=150) for _ in range(6))
        return await asyncio.gather(*asked, return_exceptions=True)

    with in_thread(**settings_for(tiny, "honest", "kind"), max_queue=1) as served:
        errors = [each for each in ask(served.url, crowd) if isinstance(each, ServerError)]
    assert errors
    assert all(error.status == 429 and "The server is busy." in str(error) for error in errors)


def test_keys_are_sent_and_those_no_key_can_be_are_refused(tiny: Path) -> None:
    with in_thread(**settings_for(tiny, "honest"), api_key="sesame") as served:
        assert ask(served.url, lambda client: client.health()) is None
        for key in ("", "wrong", "sésame", "ses\name", "ses\x00ame"):
            with pytest.raises(ServerError, match="The API key is missing or wrong") as refused:
                ask(served.url, lambda client, key=key: client.adapters(key))
            assert refused.value.status == 401
        for key in ("sesame", " sesame \n"):  # blanks come along when a key is copied
            found = ask(served.url, lambda client, key=key: client.adapters(key))
            assert [each["id"] for each in found] == ["honest"]


def test_the_page_on_its_own_passes_on_how_its_server_is(served: Served) -> None:
    for url, status in ((served.url + "/", 200), (f"http://127.0.0.1:{free_port()}", 502)):
        with standalone(url, status=status) as page:
            assert "ipissa" in page.http.get("/").text


class EndedEngine(BaseHTTPRequestHandler):
    """A server whose engine has ended, and which has a run for every adapter of any name."""

    def do_GET(self) -> None:
        ended = {"error": {"message": "The engine has ended; restart the server.", "code": "engine_dead"}}
        status, body = (503, ended) if self.path == "/health" else (200, {"path": self.path})
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def ended() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), EndedEngine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_page_on_its_own_passes_on_why_its_server_is_not_ready(ended: str) -> None:
    with standalone(ended, status=503) as page:
        assert page.http.get("/health").json()["error"] == {
            "message": "The engine has ended; restart the server.",
            "code": "engine_dead",
        }


def test_the_run_of_an_adapter_is_asked_for_whatever_its_name(ended: str) -> None:
    asked = ask(ended, lambda client: client.training_run("", "a/b#1?"))
    assert asked["path"] == "/v1/adapters/a%2Fb%231%3F/run"


def test_the_page_answers_no_route_that_moves_files_or_fetches_for_others() -> None:
    with standalone(f"http://127.0.0.1:{free_port()}", status=502) as page:
        files = {"files": ("a.txt", b"text")}
        for route in ("upload", "process_recording", "component_server", "vibe-code"):
            assert page.http.post(f"/gradio_api/{route}", files=files).status_code == 404, route
        for route in (
            "file=https://example.com/", "file/x", "proxy=https://a.hf.space/x", "deep_link?session_hash=x",
            "upload_progress?upload_id=x", "/file=https://example.com/", "runs",
        ):  # fmt: skip
            assert page.http.get(f"/gradio_api/{route}").status_code == 404, route
        assert page.http.get("/monitoring").status_code == 404
        for route in ("/", "/config", "/theme.css", "/gradio_api/info"):
            assert page.http.get(route).status_code == 200, route


def test_the_command_refuses_what_is_no_address_without_a_traceback() -> None:
    command = [str(Path(sys.executable).parent / "ipissa-ui"), "--server", "localhost:8000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "'localhost:8000' is not an address" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_page_uses_the_http_api_and_nothing_of_the_server_or_the_method() -> None:
    for path in (ROOT / "ui").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"ipissa", "ipissa_server", "torch"}, path
