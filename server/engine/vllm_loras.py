"""Settings of the dials as vLLM's LoRA requests, each baked when it is first asked for and held while it is used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from vllm.lora.request import LoRARequest

from ipissa.adapter import Adapter
from ipissa.adapter.baking import Baker
from ipissa.adapter.lora_store import LoraStore, StoreInfo

from .base import Steer

Setting = tuple[tuple[str, float], ...]
STORED = 64


def setting_of(steer: Steer) -> Setting:
    """What is left of a steer without adapters at 0; empty for the base model."""
    return tuple(sorted((name, alpha) for name, alpha in steer.items() if alpha))


class Loras:
    """The LoRAs of one set of adapters.

    Args:
        dtype: What the model computes in.
        at_least: How many settings may be held at once.
    """

    def __init__(self, adapters: Mapping[str, Adapter], *, dtype: str, at_least: int) -> None:
        # One thread, as every thread that ever baked keeps a team of others (`threads.py`).
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ipissa-baker")
        self._store = LoraStore(Baker(adapters, dtype=dtype), capacity=max(STORED, at_least))
        self.adapters: dict[str, Adapter] = self._store.baker.adapters

    @asynccontextmanager
    async def held(self, setting: Setting) -> AsyncIterator[LoRARequest | None]:
        """The request of a setting, whose files stay while the block runs; None for the base model.

        Its name, number and path follow from the adapters' files and α, so that vLLM, which keeps LoRAs by number
        and prefixes by name and path, never takes one for another.
        """
        if not setting:
            yield None
            return
        lease = self._store.lease(dict(setting))
        entering = asyncio.get_running_loop().run_in_executor(self._thread, lease.__enter__)
        try:
            lora = await asyncio.shield(entering)
            yield LoRARequest(lora_name=lora.key, lora_int_id=lora.number, lora_path=str(lora.path))
        finally:  # once it has been entered, which may be after this task was cancelled
            entering.add_done_callback(lambda done: _end(lease, done))

    def info(self) -> dict[str, StoreInfo]:
        """Hits, misses and stored settings of every adapter."""
        return self._store.info()

    def close(self) -> None:
        """Remove all files."""
        self._thread.shutdown(cancel_futures=True)
        self._store.close()


def _end(lease: Any, entering: asyncio.Future[Any]) -> None:
    if not entering.cancelled() and entering.exception() is None:
        lease.__exit__(None, None, None)
