"""What routes depend on: the settings, the loaded engine, the API key, and the client still being there."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from .engine.base import Engine, EngineLoadingError
from .errors import ApiError, ClientGoneError
from .settings import Settings

T = TypeVar("T")
bearer = HTTPBearer(auto_error=False)


def get_settings(request: Request) -> Settings:
    """The server's settings."""
    return request.app.state.settings


def get_engine(request: Request) -> Engine:
    """The engine, once it is loaded; 503 until then, and when it has ended."""
    engine = request.app.state.engine
    if engine is None:
        raise EngineLoadingError("The model is still loading; try again in a moment, /health says when it is ready.")
    if not engine.healthy:
        raise ApiError(503, "The engine has ended; if nobody stopped the server, restart it.", code="engine_dead")
    return engine


def check_key(
    settings: Annotated[Settings, Depends(get_settings)],
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> None:
    """401 unless the request carries the server's API key, if it has one."""
    if settings.api_key is None:
        return
    given = credentials.credentials if credentials else ""
    if not secrets.compare_digest(given.encode(), settings.api_key.encode()):
        raise ApiError(
            401, "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.", code="invalid_api_key"
        )


SettingsDep = Annotated[Settings, Depends(get_settings)]
EngineDep = Annotated[Engine, Depends(get_engine)]


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, cancelling it if the client hangs up first, so that nothing is computed for nobody."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
