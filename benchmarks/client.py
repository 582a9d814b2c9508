"""A server in a process of its own, and clients that stream from it all at once."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 600


@dataclass
class Stream:
    """What one client saw."""

    started: float
    arrivals: list[float] = field(default_factory=list)  # of each token, in seconds of the same clock

    @property
    def first_token_seconds(self) -> float:
        """From request to first token."""
        return self.arrivals[0] - self.started


class Server:
    """An OpenAI-compatible server, ours or another."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model

    def streams(self, bodies: list[dict[str, Any]]) -> list[Stream]:
        """Stream completions of all bodies at the same time, each as {"prompt": ..., "max_tokens": ...}."""
        return asyncio.run(self._streams(bodies))

    def seconds_per_token(self, bodies: list[dict[str, Any]], *, at_once: bool = True) -> float:
        """From the first request to the last token, per token; one request after the other if not at once."""
        streams = self.streams(bodies) if at_once else [self.streams([body])[0] for body in bodies]
        tokens = sum(len(stream.arrivals) for stream in streams)
        asked = sum(body["max_tokens"] for body in bodies)
        if tokens < asked:  # an early end would time the prompt instead
            raise RuntimeError(f"{self.url} gave {tokens} tokens of {asked}; benchmark a prompt that goes on.")
        return (max(s.arrivals[-1] for s in streams) - min(s.started for s in streams)) / tokens

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """One JSON request, answered."""
        response = httpx.post(self.url + path, json=body, timeout=600)
        response.raise_for_status()
        return response.json()

    async def _streams(self, bodies: list[dict[str, Any]]) -> list[Stream]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=600, limits=limits) as client:
            return await asyncio.gather(*(self._stream(client, body) for body in bodies))

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Stream:
        wait = body.pop("wait", 0) if "wait" in (body := dict(body)) else 0
        await asyncio.sleep(wait)
        stream = Stream(time.perf_counter())
        full = {"model": self.model, "temperature": 0, "stream": True, **body}
        async with client.stream("POST", "/v1/completions", json=full) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{self.url} answered {response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:]).get("choices"):
                    stream.arrivals.append(time.perf_counter())
        return stream


@contextmanager
def serving(model: str, dtype: str, *options: str, page: bool = False) -> Iterator[Server]:
    """`ipissa-serve` with the shipped adapters, with its page or without."""
    command = ["ipissa-serve", *([] if page else ["--no-ui"]), "--dtype", dtype, *options]
    with started(command, model) as server:
        yield server


@contextmanager
def started(command: list[str], model: str) -> Iterator[Server]:
    """One of this environment's servers, on a free port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    arguments = [str(Path(sys.executable).parent / command[0]), *command[1:], "--port", str(port)]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            server = Server(f"http://127.0.0.1:{port}", model)
            _wait(server, process)
            yield server
        finally:
            process.terminate()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(server.url + "/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{server.url} did not become ready in {START_SECONDS} s.")
