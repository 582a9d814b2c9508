"""The page on its own, and a server in between that counts."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn
from serving import Served, free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


class Counting:
    """Passes every request on to a server, and counts the score requests that are under way."""

    def __init__(self, url: str) -> None:
        self.url, self.scores, self.most_at_once, self.under_way = url, 0, 0, 0
        self.http = httpx.AsyncClient(base_url=url, timeout=120, trust_env=False)
        self.app = Starlette(routes=[Route("/{path:path}", self.forward, methods=["GET", "POST"])])

    async def forward(self, request: Request) -> Response:
        is_score = request.url.path == "/v1/score"
        self.scores += is_score
        self.under_way += is_score
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
            sent = self.http.build_request(
                request.method, request.url.path, content=await request.body(), headers=headers
            )
            answer = await self.http.send(sent, stream=True)
            if "event-stream" in answer.headers.get("content-type", ""):
                return StreamingResponse(answer.aiter_raw(), media_type="text/event-stream")
            await answer.aread()
        finally:
            self.under_way -= is_score
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))


@contextmanager
def counted(url: str) -> Iterator[Counting]:
    """A `Counting` in front of a server."""
    counting, port = Counting(url), free_port()
    server = uvicorn.Server(uvicorn.Config(counting.app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    counting.url = f"http://127.0.0.1:{port}"
    try:
        yield counting
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def standalone(server_url: str, *, status: int = 200) -> Iterator[Served]:
    """Run the `ipissa-ui` command, and wait until its `/health` has a status."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "ipissa-ui"), "--server", server_url, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        served = Served(f"http://127.0.0.1:{port}")
        try:
            while _health(served) != status:
                time.sleep(0.2)
            yield served
        finally:
            served.close()
            process.terminate()
            process.wait(timeout=30)


def _health(served: Served) -> int | None:
    try:
        return served.http.get("/health").status_code
    except httpx.TransportError:
        return None
