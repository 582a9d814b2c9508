"""The application: settings in, a FastAPI app out, the engine loading behind it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import Any

from fastapi import Depends, FastAPI, Request

import ipissa
from ipissa.adapter import AnyAdapter, load_adapter
from ipissa.errors import ConfigError

from .deps import check_key
from .engine.base import Engine
from .engine.torch_engine import DEFAULT_CACHE_TOKENS, TorchEngine
from .errors import install_error_handlers, not_found
from .metrics import Metrics, MetricsMiddleware
from .routes import adapters as adapter_routes
from .routes import chat, completions, health, models, score, tokens
from .schemas import now
from .settings import Settings
from .threads import in_passing_thread

logger = logging.getLogger(__name__)


def load_torch(settings: Settings, adapters: dict[str, AnyAdapter]) -> Engine:
    """The model in this process."""
    return TorchEngine(
        settings.model,
        adapters,
        **_common(settings),
        max_cache_tokens=settings.max_cache_tokens or DEFAULT_CACHE_TOKENS,
    )


def load_vllm(settings: Settings, adapters: dict[str, AnyAdapter]) -> Engine:
    """The model in vLLM's processes."""
    if find_spec("vllm") is None:
        raise ConfigError("The engine vllm needs vLLM in this environment; docs/scaling.md says how to install it.")
    from .engine.vllm_engine import VllmEngine

    return VllmEngine(
        settings.model,
        adapters,
        **_common(settings),
        max_cache_tokens=settings.max_cache_tokens,
        options=settings.vllm,
    )


def _common(settings: Settings) -> dict[str, Any]:
    """What every engine is told."""
    return {
        "device": settings.device,
        "dtype": settings.dtype,
        "max_batch": settings.max_batch,
        "max_queue": settings.max_queue,
        "max_model_len": settings.max_model_len,
    }


ENGINES: dict[str, Callable[[Settings, dict[str, AnyAdapter]], Engine]] = {"torch": load_torch, "vllm": load_vllm}


def load_engine(settings: Settings, adapters: dict[str, AnyAdapter]) -> Engine:
    """Load the model and its adapters, and start the engine that was asked for."""
    return ENGINES[settings.engine](settings, adapters)


def create_app(settings: Settings, *, on_load_error: Callable[[Exception], None] | None = None) -> FastAPI:
    """The app. It answers at once, with 503 until the engine has loaded in the background.

    Args:
        settings: What to serve.
        on_load_error: Called once if the engine cannot be loaded; the app can then only be stopped.

    Raises:
        AdapterFileError: an adapter file is unusable; nothing is served then.
    """
    adapters = {name: in_passing_thread(load_adapter, path) for name, path in settings.adapters.items()}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(app, adapters, on_load_error))
        yield
        await asyncio.gather(loading, return_exceptions=True)
        if app.state.engine is not None:
            await asyncio.to_thread(app.state.engine.close)

    app = FastAPI(title="ipissa", version=ipissa.__version__, description=ipissa.__doc__, lifespan=lifespan)
    app.state.settings = settings
    app.state.engine = None
    app.state.started = now()
    app.state.adapter_paths = dict(settings.adapters)
    app.state.metrics = Metrics(lambda: app.state.engine)
    app.add_middleware(MetricsMiddleware, metrics=app.state.metrics)
    install_error_handlers(app)
    app.include_router(health.router)
    for noun in (completions, chat, score, models, adapter_routes, tokens):
        app.include_router(noun.router, dependencies=[Depends(check_key)])
    app.add_api_route("/v1/{path:path}", _no_such_route, include_in_schema=False, methods=["GET", "POST", "DELETE"])
    return _with_page(app, settings) if settings.ui else app


async def _no_such_route(request: Request) -> None:
    """What /v1 lacks is an API error, not a part of the page that is mounted behind it."""
    raise not_found(f"There is no {request.method} {request.url.path}; /docs lists the routes.")


async def _load(
    app: FastAPI, adapters: dict[str, AnyAdapter], on_load_error: Callable[[Exception], None] | None
) -> None:
    settings: Settings = app.state.settings
    try:
        engine = await asyncio.to_thread(load_engine, settings, adapters)
        await engine.start()
        app.state.engine = engine
        logger.info("serving %s with %s", settings.model, ", ".join(adapters) or "no adapter")
    except Exception as error:
        if on_load_error is None:
            raise
        on_load_error(error)


def _with_page(app: FastAPI, settings: Settings) -> FastAPI:
    """The page at `/`: a client of this server's own HTTP address, mounted last so that routes win."""
    try:
        from ipissa_ui.client import Client
        from ipissa_ui.page import mount_page
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'The page needs {error.name}: run `pip install "ipissa[ui]"` (in a checkout `pip install ".[ui]"`), or '
            "pass --no-ui."
        ) from error
    return mount_page(app, Client(_own_url(settings), has_page=True))


def _own_url(settings: Settings) -> str:
    """Where the page, which runs in this process, finds the server."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (looked up, not bound)
    host = everywhere.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
