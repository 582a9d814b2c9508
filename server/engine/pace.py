"""How much other work may come between two decode steps, so that running streams keep flowing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

STALL = 1.5  # other work between two decode steps may take this many of them
MOST = 8192  # tokens per call when nobody would notice
FIRST = 64  # tokens of the first call, before anything was timed
WEIGHT = 0.3  # of the newest measurement


class Pace:
    """Measures decode steps and prefill, and says how many tokens a prefill call may have.

    A stream whose neighbour has a long prompt to read then waits about 1 + STALL times its usual gap
    for a token, on any machine.
    """

    def __init__(self, finish: Callable[[], None] = lambda: None) -> None:
        self._finish = finish  # waits until the device is done, or launching would be all that is timed
        self._step: float | None = None  # seconds of a decode step
        self._token: float | None = None  # seconds per prefilled token

    def tokens(self, *, decoding: bool) -> int:
        """Tokens for the next prefill or score call."""
        if not decoding:
            return MOST
        if self._step is None or self._token is None:
            return FIRST
        return max(1, min(MOST, int(STALL * self._step / self._token)))

    @classmethod
    def on(cls, device: torch.device) -> Pace:
        """For calls that run on a device."""
        return cls(partial(torch.cuda.synchronize, device)) if device.type == "cuda" else cls()

    @contextmanager
    def decode(self) -> Iterator[None]:
        """Times a decode step."""
        started = time.perf_counter()
        yield
        self._finish()
        self._step = _smooth(self._step, time.perf_counter() - started)

    @contextmanager
    def prefill(self, tokens: int) -> Iterator[None]:
        """Times a call that reads so many tokens."""
        started = time.perf_counter()
        yield
        self._finish()
        self._token = _smooth(self._token, (time.perf_counter() - started) / tokens)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else (1 - WEIGHT) * old + WEIGHT * new
