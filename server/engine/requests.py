"""How many requests wait or run, and which adapters they steer by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from ipissa.adapter import AnyAdapter

from .base import OverloadedError, Steer, UnknownAdapterError


def check_loaded(adapters: Mapping[str, AnyAdapter], steers: Iterable[Steer], digests: Mapping[str, str]) -> None:
    """Refuse a request whose adapters are gone, or others now under their names.

    Args:
        digests: Of the adapters that the request was read for, by name; those without one may be any.

    Raises:
        UnknownAdapterError: it names the first.
    """
    for name in sorted({name for steer in steers for name in steer}):
        if name not in adapters or (name in digests and digests[name] != (adapters[name].digest or "")):
            raise UnknownAdapterError(f"The adapter {name!r} was unloaded meanwhile.")


class Requests:
    """The requests an engine has taken. Used on the event loop only.

    Args:
        most: More than these are refused.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._in_use: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def counted(self, steers: Iterable[Steer]) -> Iterator[None]:
        """Count a request, and the adapters it names, for as long as it waits or runs.

        Raises:
            OverloadedError: there are too many already.
        """
        if self._count >= self._most:
            raise OverloadedError(
                f"{self._count} requests are waiting or running, the most this server takes; try again."
            )
        names = {name for steer in steers for name in steer}
        self._count += 1
        self._in_use.update(names)
        try:
            yield
        finally:
            self._count -= 1
            self._in_use.subtract(names)

    def use(self, name: str) -> bool:
        """Whether any of them is steered by the adapter."""
        return self._in_use[name] > 0
