"""LoRAs of α buckets, made when they are first asked for and kept in memory-backed storage.

    store = LoraStore(adapters)
    with store.lease({"honest": 0.75}) as lora:
        ...  # lora.path stays there, however many others are asked for meanwhile

A store is a folder of its own below `$IPISSA_LORA_DIR` or /dev/shm, locked while its process lives;
the next store that is made there sweeps away what a killed process left.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ipissa.adapter.baking import Baker
from ipissa.adapter.lora import new_folder
from ipissa.errors import AlphaError, ConfigError

PREFIX = "ipissa-loras-"
MEMORY = Path("/dev/shm")  # noqa: S108 (a folder of our own is made in it)
DEFAULT_CAPACITY = 64


@dataclass(frozen=True)
class BakedLora:
    """A LoRA on disk. `key` and `number` follow from the adapters' files and their α alone."""

    key: str
    number: int  # 2**62 .. 2**63 - 1, out of the way of numbers that are counted up from 1
    path: Path


@dataclass
class StoreInfo:
    """How often a setting was found in the store, or had to be made, and how many are there now."""

    hits: int = 0
    misses: int = 0
    currsize: int = 0


class LoraStore:
    """A bounded, least-recently-used set of LoRA folders. Methods may be called from any thread.

    Args:
        baker: Makes them; its adapters must have been read from files.
        capacity: How many settings are kept; more only while more are leased.
        parent: Where the store makes its folder.
    """

    def __init__(self, baker: Baker, *, capacity: int = DEFAULT_CAPACITY, parent: Path | None = None) -> None:
        self.baker = baker
        self._capacity = capacity
        self._stored: OrderedDict[str, tuple[BakedLora, tuple[str, ...]]] = OrderedDict()
        self._leases: Counter[str] = Counter()
        self._hits: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._lock = threading.Lock()  # guards the above, and is never held for long
        self._baking = threading.Lock()  # one setting is made at a time
        self.folder, lock = _new_store(parent or default_parent())
        self._finalizer = weakref.finalize(self, _remove_store, self.folder, lock, os.getpid())

    def get(self, steer: Mapping[str, float]) -> BakedLora:
        """The LoRA of a setting, made now if it is not there; the next call may evict it.

        Raises:
            AlphaError: every α is 0; that is the base model, and needs no LoRA.
        """
        return self._take(steer, leases=0)

    def touch(self, key: str) -> bool:
        """Count a setting as used just now; False if it is not there any more."""
        return self._find(key, leases=0) is not None

    @contextmanager
    def lease(self, steer: Mapping[str, float]) -> Iterator[BakedLora]:
        """The LoRA of a setting, which stays where it is until the block ends."""
        lora = self._take(steer, leases=1)
        try:
            yield lora
        finally:
            with self._lock:
                self._leases[lora.key] -= 1
                self._leases += Counter()  # drops those at zero

    def _take(self, steer: Mapping[str, float], *, leases: int) -> BakedLora:
        turned = {name: alpha for name, alpha in sorted(steer.items()) if alpha}
        if not turned:
            raise AlphaError("Every α is 0: that is the base model, which needs no LoRA.")
        key = self._key(turned)
        if (found := self._find(key, leases=leases)) is None:
            with self._baking:
                if (found := self._find(key, leases=leases)) is None:  # nobody else has made it meanwhile
                    found = self._make(key, turned, leases)
        return found

    def _find(self, key: str, *, leases: int) -> BakedLora | None:
        with self._lock:
            if key not in self._stored:
                return None
            self._stored.move_to_end(key)
            lora, names = self._stored[key]
            self._hits.update(names)
            self._leases[key] += leases
            return lora

    def _make(self, key: str, turned: dict[str, float], leases: int) -> BakedLora:
        for old in self._evicted():
            shutil.rmtree(old)
        lora = BakedLora(key, _number(key), self.folder / key)
        with new_folder(lora.path) as work:
            self.baker.bake(turned, work)
        with self._lock:
            self._misses.update(list(turned))
            self._stored[key] = (lora, tuple(turned))
            self._leases[key] += leases
        return lora

    def _evicted(self) -> list[Path]:
        """Make room for one more. Renamed before they are removed: a reader sees all of a folder or none."""
        gone = []
        with self._lock:
            for key in [key for key in self._stored if not self._leases[key]]:
                if len(self._stored) < self._capacity:
                    break
                lora, _ = self._stored.pop(key)
                gone.append(lora.path.rename(lora.path.with_name(f".{key}")))
        return gone

    def info(self) -> dict[str, StoreInfo]:
        """Hits, misses and stored settings of every adapter."""
        with self._lock:
            sizes = Counter(name for _, names in self._stored.values() for name in names)
            return {name: StoreInfo(self._hits[name], self._misses[name], sizes[name]) for name in self.baker.adapters}

    def __len__(self) -> int:
        return len(self._stored)

    def close(self) -> None:
        """Remove the folder and everything in it."""
        self._finalizer()

    def _key(self, steer: Mapping[str, float]) -> str:
        """Settings have equal keys if and only if they turn the same files equally far."""
        parts = []
        for name, alpha in steer.items():
            digest = self.baker.adapters[name].digest
            if digest is None:
                raise ConfigError(f"The adapter {name!r} was not read from a file; save it and load it.")
            parts.append(f"{digest}@{alpha!r}")
        return hashlib.sha256("+".join(sorted(parts)).encode()).hexdigest()[:32]


def _number(key: str) -> int:
    return (int(key[:16], 16) >> 2) | (1 << 62)


def default_parent() -> Path:
    """$IPISSA_LORA_DIR, else memory, else the system's folder for temporary files."""
    if "IPISSA_LORA_DIR" in os.environ:
        return Path(os.environ["IPISSA_LORA_DIR"])
    return MEMORY if os.access(MEMORY, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _new_store(parent: Path) -> tuple[Path, int]:
    """A fresh folder, and the lock that says its process lives."""
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))  # from sweeping, until it is locked
    lock = os.open(hidden / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return hidden.rename(parent / hidden.name.removeprefix(".")), lock


def _sweep(parent: Path) -> None:
    """Remove stores whose process is gone: the system gives a lock back when its last holder ends."""
    for path in parent.glob(f"{PREFIX}*/lock"):
        try:
            lock = os.open(path, os.O_RDWR)
        except OSError:  # another user's, or just removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def _remove_store(folder: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # and not in a process forked from it
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
