"""Who may be in vLLM's batch: as many rows, and as many different settings, as it has places for.

vLLM would queue what does not fit by itself, but then scores would queue behind generations, and every setting
that waits would have its LoRA held in memory.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class _Waiting:
    setting: Hashable
    place: asyncio.Future[None]
    passed: int = 0  # rows that came after it and went in before it


class Gate:
    """Lets rows in while there is room, in the order they came, but past those whose setting has no place yet.

    A row that as many have passed as there is room for is passed by no setting any more, or its own might never get
    a place.

    Args:
        rows: Most rows inside.
        settings: Most different settings inside; None, the base model, is none of them.
    """

    def __init__(self, rows: int, settings: int) -> None:
        self._rows, self._settings = rows, settings
        self._inside: Counter[Hashable] = Counter()
        self._waiting: deque[_Waiting] = deque()

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
        row = _Waiting(setting, asyncio.get_running_loop().create_future())
        self._waiting.append(row)
        try:
            self._admit()
            await row.place
            yield
        finally:
            if row in self._waiting:  # cancelled before it got in
                self._waiting.remove(row)
                self._admit()
            else:
                self._inside -= Counter({setting: 1})  # and forgets it with its last row
                self._admit()

    def _admit(self) -> None:
        left: list[_Waiting] = []
        for row in list(self._waiting):
            stopped = row.setting is not None and left and left[0].passed >= self._rows  # the first is passed most
            if stopped or not self._has_room(row.setting):
                left.append(row)
                continue
            self._waiting.remove(row)
            self._inside[row.setting] += 1
            if not row.place.done():
                row.place.set_result(None)
            if row.setting is not None:  # the base model keeps no setting's place
                for earlier in left:
                    earlier.passed += 1

    def _has_room(self, setting: Hashable) -> bool:
        known = setting is None or setting in self._inside
        settings = len(self._inside.keys() - {None})
        return self.inside < self._rows and (known or settings < self._settings)
