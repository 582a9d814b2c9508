"""/v1/adapters: what adapters are loaded, and changing that while the server runs."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from ipissa.adapter import AnyAdapter, load_adapter

from ..deps import EngineDep, SettingsDep
from ..errors import ApiError, bad_request, not_found
from ..runs import read_run, run_folder
from ..schemas import AddAdapterBody
from ..settings import Settings
from ..threads import in_passing_thread

router = APIRouter()


def managed(settings: SettingsDep) -> Settings:
    """403 unless the operator allowed changing adapters: with a folder to take them from, and a key."""
    if settings.adapter_dir is None or settings.api_key is None:
        raise ApiError(
            403,
            "Adapters can be changed only on a server started with --adapter-dir and --api-key.",
            code="not_allowed",
        )
    return settings


Managed = Annotated[Settings, Depends(managed)]


@router.get("/v1/adapters")
async def adapters(request: Request, engine: EngineDep, settings: SettingsDep) -> dict[str, Any]:
    """Every adapter's configuration, digest, α range, evaluation and card."""
    cards: dict[str, Path] = request.app.state.adapter_paths
    data = [describe(name, adapter, cards.get(name), settings) for name, adapter in engine.adapters.items()]
    return {"object": "list", "data": data}


@router.post("/v1/adapters", status_code=201)
async def add_adapter(body: AddAdapterBody, request: Request, engine: EngineDep, settings: Managed) -> dict[str, Any]:
    """Load one more adapter from the server's adapter folder."""
    assert settings.adapter_dir is not None
    root = settings.adapter_dir.resolve()
    try:
        path = (root / body.path).resolve()
    except (OSError, ValueError) as error:
        raise bad_request(f"path {body.path!r} is not a usable path: {error}.", param="path") from error
    if not path.is_relative_to(root):
        raise bad_request(f"path {body.path!r} leads out of the adapter folder.", param="path")
    if body.name == settings.model:
        raise ApiError(409, f"{body.name!r} is the base model's name; choose another.", param="name", code="name_taken")
    adapter = await asyncio.to_thread(in_passing_thread, load_adapter, path)
    await engine.add_adapter(body.name, adapter)
    request.app.state.adapter_paths[body.name] = path
    return describe(body.name, adapter, path, settings)


@router.delete("/v1/adapters/{name}")
async def remove_adapter(name: str, request: Request, engine: EngineDep, settings: Managed) -> dict[str, Any]:
    """Unload an adapter that no running request uses."""
    await engine.remove_adapter(name)
    request.app.state.adapter_paths.pop(name, None)
    return {"id": name, "object": "adapter.deleted", "deleted": True}


@router.get("/v1/adapters/{name}/run")
async def training_run(name: str, request: Request, engine: EngineDep) -> dict[str, Any]:
    """What the training of an adapter recorded, from the run folder beside its file."""
    if name not in engine.adapters:
        raise not_found(f"The adapter {name!r} does not exist; /v1/adapters lists what does.", code="adapter_not_found")
    path: Path | None = request.app.state.adapter_paths.get(name)
    folder = run_folder(path)
    if folder is None:
        raise not_found(f"The adapter {name!r} has no training run beside its file.", code="run_not_found")
    return {"id": name, "object": "adapter.run", **await asyncio.to_thread(read_run, folder)}


def describe(name: str, adapter: AnyAdapter, path: Path | None, settings: Settings) -> dict[str, Any]:
    """An adapter as the API shows it; `card` is the Markdown file beside the adapter's."""
    card = path.with_suffix(".md") if path else None
    return {
        "id": name,
        "object": "adapter",
        "parent": settings.model,
        "kind": adapter.kind,
        "digest": adapter.digest,
        "alpha_range": list(adapter.alpha_range),
        "max_alpha": settings.max_alpha,
        "config": asdict(adapter.config),
        "trait": adapter.trait,
        "base_model": adapter.base_model,
        "evaluation": adapter.evaluation,
        "license": adapter.license,
        "card": card.read_text(encoding="utf-8", errors="replace") if card and card.is_file() else None,
        "has_run": run_folder(path) is not None,
    }
