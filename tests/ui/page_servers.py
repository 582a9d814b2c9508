"""A server in between that counts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import uvicorn
from ipissa_server.deps import unless_disconnected
from ipissa_server.errors import ClientGoneError
from serving import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

HANG_UP = 0.05  # seconds by which a hang-up is noticed that came before another request


class Counting:
    """Passes every request on to a server, and counts the score requests that are under way: not hung up on."""

    def __init__(self, url: str) -> None:
        self.url, self.scores, self.most_at_once, self.under_way = url, 0, 0, 0
        self.http = httpx.AsyncClient(base_url=url, timeout=120, trust_env=False)
        routes = [Route("/{path:path}", self.forward, methods=["GET", "POST"])]
        self.app = Starlette(routes=routes, lifespan=self.running)

    @asynccontextmanager
    async def running(self, app: Starlette) -> AsyncIterator[None]:
        async with self.http:
            yield

    async def forward(self, request: Request) -> Response:
        is_score = request.url.path == "/v1/score"
        if is_score:
            await asyncio.sleep(HANG_UP)
        self.scores += is_score
        self.under_way += is_score
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
            sent = self.http.build_request(
                request.method, request.url.path, content=await request.body(), headers=headers
            )
            answer = await unless_disconnected(request, self.http.send(sent, stream=True))
            if "event-stream" in answer.headers.get("content-type", ""):
                return StreamingResponse(answer.aiter_raw(), media_type="text/event-stream")
            await answer.aread()
        except ClientGoneError:
            return Response(status_code=499)
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
