"""Who may be in vLLM's batch: as many rows, and as many different settings, as it has places for.

vLLM would queue what does not fit by itself, but then scores would queue behind generations, and every setting
that waits would have its LoRA held in memory.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager


class Gate:
    """Lets rows in while there is room, in the order they came, but past those whose setting has no place yet.

    Args:
        rows: Most rows inside.
        settings: Most different settings inside; None, the base model, is none of them.
    """

    def __init__(self, rows: int, settings: int) -> None:
        self._rows, self._settings = rows, settings
        self._inside: Counter[Hashable] = Counter()
        self._waiting: deque[tuple[Hashable, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    @property
    def inside(self) -> int:
        """Rows inside."""
        return self._inside.total()

    @asynccontextmanager
    async def enter(self, setting: Hashable) -> AsyncIterator[None]:
        """Wait for a place, and hold it until the block ends."""
        entry = (setting, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        try:
            self._admit()
            await entry[1]
            yield
        finally:
            if entry in self._waiting:  # cancelled before it got in
                self._waiting.remove(entry)
            else:
                self._inside -= Counter({setting: 1})  # and forgets it with its last row
                self._admit()

    def _admit(self) -> None:
        for entry in list(self._waiting):
            setting, place = entry
            if self._has_room(setting):
                self._waiting.remove(entry)
                self._inside[setting] += 1
                if not place.done():
                    place.set_result(None)

    def _has_room(self, setting: Hashable) -> bool:
        known = setting is None or setting in self._inside
        settings = len(self._inside.keys() - {None})
        return self.inside < self._rows and (known or settings < self._settings)
