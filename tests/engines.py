"""Engines on the tiny model, and what a request to one gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

from ipissa_server.engine.base import GenerationRequest
from ipissa_server.engine.torch_engine import TorchEngine

import ipissa
from ipissa.adapter import Adapter

NAMES = ("honest", "kind")


def adapters_of(tiny: Path) -> dict[str, Adapter]:
    """The adapters of the tiny model by name."""
    return {name: ipissa.load_adapter(tiny / "adapters" / f"{name}.safetensors") for name in NAMES}


@contextmanager
def engine_for(tiny: Path, adapters: dict[str, Adapter] | None = None, **settings: Any) -> Iterator[TorchEngine]:
    """An engine on the tiny model in float32."""
    adapters = adapters_of(tiny) if adapters is None else adapters
    engine = TorchEngine(str(tiny / "model"), adapters, device="cpu", dtype="float32", **settings)
    try:
        yield engine
    finally:
        engine.close()


async def run(engine: TorchEngine, request: GenerationRequest) -> list[list[Any]]:
    """The log-probability entries of every row."""
    rows: list[list[Any]] = [[] for _ in request.rows]
    async with aclosing(engine.generate(request)) as steps:  # type: ignore[type-var]
        async for deltas in steps:
            for delta in deltas:
                rows[delta.row] += delta.logprobs
    return rows
