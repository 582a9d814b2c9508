"""GET /health, /metrics and /version: for operators; open without an API key."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.requests import Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import ipissa

from ..deps import EngineDep

router = APIRouter()


@router.get("/health")
async def health(engine: EngineDep) -> dict[str, str]:
    """200 once the model is loaded, 503 before, and again when its engine has ended."""
    return {"status": "ok", "model": engine.model_name}


@router.get("/version")
async def version() -> dict[str, str]:
    """The server's version."""
    return {"version": ipissa.__version__}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
