"""What passes between the event loop and the worker thread: work one way, answers the other."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .base import OverloadedError, TokenOut
from .scores import ScoreJob
from .sequence import Job


class Mailbox:
    """Work that waits for the worker. Put in on the event loop, taken out by the worker."""

    def __init__(self) -> None:
        self._wake = threading.Condition()  # guards all below
        self._closed = False
        self.calls: deque[Call] = deque()
        self.scores: deque[ScoreJob] = deque()
        self.generations: deque[Job] = deque()

    def put(self, work: Call | ScoreJob | Job) -> None:
        """Leave work for the worker.

        Raises:
            OverloadedError: the mailbox is closed.
        """
        with self._wake:
            if self._closed:
                raise OverloadedError("The server is shutting down.")
            if isinstance(work, Call):
                self.calls.append(work)
            elif isinstance(work, ScoreJob):
                self.scores.append(work)
            else:
                self.generations.append(work)
            self._wake.notify()

    def wait(self, has_work: Callable[[], object]) -> bool:
        """Wait until there is something to take out, or the worker has work of its own; False once closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self.calls or self.scores or self.generations or has_work())
            return not self._closed

    def requests(self) -> tuple[list[Job], list[ScoreJob]]:
        """The generations and scores that wait just now."""
        with self._wake:
            return list(self.generations), list(self.scores)

    def take_scores(self) -> list[ScoreJob]:
        """The scores that wait, out of the mailbox."""
        with self._wake:
            taken, self.scores = self.scores, deque()
        return list(taken)

    def drop_cancelled_scores(self) -> None:
        """Forget the scores that nobody waits for."""
        with self._wake:
            self.scores = deque(job for job in self.scores if not job.cancelled)

    def close(self) -> None:
        """Take no more, and let the worker end."""
        with self._wake:
            self._closed = True
            self._wake.notify()


class Call:
    """A function that the worker runs between steps."""

    def __init__(self, function: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        self._function = function
        self.loop = loop
        self.result: asyncio.Future[None] = loop.create_future()

    def run(self) -> None:
        """Run the function and hand over its result."""
        try:
            self._function()
        except Exception as error:
            answer(self, error)
        else:
            answer(self, None)


def answer(work: Call | ScoreJob, result: object) -> None:
    """Hand over a result or an error; called by the worker."""
    _call_soon(work.loop, _settle, work.result, result)


def hand_over(outputs: dict[Job, list[TokenOut]]) -> None:
    """Send the tokens of a step to the requests they belong to, in one call per event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, list[TokenOut]]]] = {}
    for job, found in outputs.items():
        by_loop.setdefault(job.loop, []).append((job, found))
    for loop, items in by_loop.items():
        _call_soon(loop, _deliver, items)


def fail(work: Job | ScoreJob, error: Exception) -> None:
    """End a request with an error."""
    if isinstance(work, ScoreJob):
        answer(work, error)
    else:
        work.cancel()
        _call_soon(work.loop, work.outputs.put_nowait, error)


def _deliver(items: list[tuple[Job, list[TokenOut]]]) -> None:
    for job, outputs in items:
        job.outputs.put_nowait(outputs)


def _settle(future: asyncio.Future[Any], result: object) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> None:
    """Run `function` on the loop, unless it has closed because its server is gone."""
    with suppress(RuntimeError):  # what a closed loop raises
        loop.call_soon_threadsafe(function, *args)
