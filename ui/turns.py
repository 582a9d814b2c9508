"""One request at a time per user; of those that wait, only the newest goes on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass
class _Line:
    """A user's requests: the one that has the lock, and those that wait for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    newest: asyncio.Event = field(default_factory=asyncio.Event)
    order: float = -math.inf


class Turns:
    """A line per user.

        async with turns.take(user, order) as overtaken:
            if not overtaken.is_set(): ...

    `take` waits until the user's running request is done. `overtaken` is set once a newer one has come:
    who waits finds it set and leaves; who runs may watch it and give way. Browsers send over several
    connections, so requests may come in the wrong order: one of a lower `order` is overtaken from the start.
    """

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    @asynccontextmanager
    async def take(self, user: str, order: float | None = None) -> AsyncIterator[asyncio.Event]:
        """The user's next turn."""
        line = self._lines.setdefault(user, _Line())
        overtaken = asyncio.Event()
        if order is not None and order < line.order:
            overtaken.set()
            yield overtaken
            return
        line.order = line.order if order is None else order
        line.newest.set()
        line.newest = overtaken
        async with line.lock:
            yield overtaken

    def forget(self, user: str) -> None:
        """The user has left; whatever still runs gives way."""
        line = self._lines.pop(user, None)
        if line:
            line.newest.set()


async def unless(overtaken: asyncio.Event, work: Awaitable[T]) -> T | None:
    """What `work` returns, or None if it was overtaken, which cancels it."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(overtaken.wait())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def until(overtaken: asyncio.Event, items: AsyncGenerator[T, None]) -> AsyncIterator[T]:
    """The items up to where they are overtaken; their source is closed then, or when nobody listens any more."""
    try:
        while not overtaken.is_set():
            step = await unless(overtaken, anext(items, None))
            if step is None:
                return
            yield step
    finally:
        await items.aclose()
