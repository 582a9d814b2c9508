"""GET /v1/models: the base model, and every adapter as a model of its own."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ..deps import EngineDep, SettingsDep
from ..errors import not_found

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request, engine: EngineDep, settings: SettingsDep) -> dict[str, Any]:
    """The base model, then its adapters, which have it as `parent`."""
    return {"object": "list", "data": _entries(request, engine, settings)}


@router.get("/v1/models/{model:path}")
async def model(model: str, request: Request, engine: EngineDep, settings: SettingsDep) -> dict[str, Any]:
    """One model."""
    for entry in _entries(request, engine, settings):
        if entry["id"] == model:
            return entry
    raise not_found(f"The model {model!r} does not exist; /v1/models lists what does.", param="model")


def _entries(request: Request, engine: EngineDep, settings: SettingsDep) -> list[dict[str, Any]]:
    common = {"object": "model", "created": request.app.state.started, "owned_by": "ipissa"}
    base = {"id": settings.model, **common, "parent": None, "max_model_len": engine.max_model_len}
    return [base, *({"id": name, **common, "parent": settings.model} for name in engine.adapters)]
