"""Keep tensor work to one long-lived thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_passing_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` in a thread that ends with it, and return its result.

    OpenMP keeps a team of threads for every thread that ever ran a parallel region, and when the teams
    outnumber the cores, waiting threads sleep instead of spinning: decode steps of the engine's worker
    were a quarter slower because the main thread had once checked an adapter's tensors.
    """
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(function, *args, **kwargs).result()
