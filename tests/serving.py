"""Run servers for tests: the app in a thread on a free port, or the command in a process."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from ipissa_server.app import create_app
from ipissa_server.settings import Settings

START_SECONDS = 120
PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Hello there"}]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Served:
    """A running server and ways to talk to it."""

    def __init__(self, url: str, app: Any = None) -> None:
        self.url, self.app = url, app
        self.http = httpx.Client(base_url=url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="test", max_retries=0)

    def post(self, path: str, /, **body: Any) -> httpx.Response:
        """POST a JSON body."""
        return self.http.post(path, json=body)

    def health(self) -> int | None:
        """The status of /health; None while nobody answers."""
        try:
            return self.http.get("/health").status_code
        except httpx.TransportError:
            return None

    def wait_until_ready(self) -> None:
        """Until /health says 200."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.health() == 200:
                return
            time.sleep(0.1)
        raise TimeoutError(f"{self.url} did not become ready in {START_SECONDS} s")

    def close(self) -> None:
        """Close the clients."""
        self.http.close()
        self.openai.close()


@contextmanager
def in_thread(**settings: Any) -> Iterator[Served]:
    """Serve `Settings(**settings)` in this process."""
    port = free_port()
    app = create_app(Settings(port=port, **settings))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    served = Served(f"http://127.0.0.1:{port}", app)
    try:
        served.wait_until_ready()
        yield served
    finally:
        served.close()
        server.should_exit = True
        thread.join()


@contextmanager
def in_process(*arguments: str, port: int | None = None) -> Iterator[Served]:
    """Run the `ipissa-serve` command, on a free port unless one is given."""
    port = port or free_port()
    command = [str(Path(sys.executable).parent / "ipissa-serve"), "--port", str(port), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        served = Served(f"http://127.0.0.1:{port}")
        try:
            served.wait_until_ready()
            yield served
        finally:
            served.close()
            process.terminate()
            process.communicate(timeout=30)


@contextmanager
def standalone(server_url: str, *, status: int = 200) -> Iterator[Served]:
    """Run the `ipissa-ui` command, and wait until its `/health` has a status."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "ipissa-ui"), "--server", server_url, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        served = Served(f"http://127.0.0.1:{port}")
        try:
            while served.health() != status:
                assert process.poll() is None, "ipissa-ui ended"
                time.sleep(0.2)
            yield served
        finally:
            served.close()
            process.terminate()
            process.wait(timeout=30)


def settings_for(tiny: Path, *names: str, **more: Any) -> dict[str, Any]:
    """Settings that serve the `tiny` fixture's model with some of its adapters, without the page."""
    adapters = {name: tiny / "adapters" / f"{name}.safetensors" for name in names}
    return {"model": str(tiny / "model"), "adapters": adapters, "ui": False, "device": "cpu", **more}


def complete(served: Served, **body: Any) -> dict[str, Any]:
    """A greedy completion of 12 tokens unless the body says otherwise."""
    response = served.post("/v1/completions", **{"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer: dict[str, Any]) -> list[str]:
    """The text of every choice."""
    return [choice["text"] for choice in answer["choices"]]
