"""Several processes of one launcher, such as torchrun: who asks the base model, and what all of them know.

transformers' Trainer shares out the batches and averages the gradients. What a run does once (texts, teachers, files,
what is measured) the first process does, while the others wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from ipissa.errors import ConfigError

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=2)  # for texts and teachers of a large model, and for what is measured


def joined() -> bool:
    """Whether this process has found the others; the Trainer's arguments see to that."""
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this process writes and prints; the only one does."""
    return not joined() or dist.get_rank() == 0


def count() -> int:
    """How many there are."""
    return dist.get_world_size() if joined() else 1


def of_the_first(compute: Callable[[], T]) -> T:
    """What the first process computes, in every process; all of them must come here, and none from within `compute`."""
    if not joined():
        return compute()
    found = [compute() if is_first() else None]
    dist.broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


def averaged(values: Mapping[str, float]) -> dict[str, float]:
    """The mean of every value over all processes, which have the same names."""
    if not joined():
        return dict(values)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return dict(zip(values, (sums / count()).tolist(), strict=True))


def refuse_launcher(what: str) -> None:
    """For what would be done once in every process.

    Raises:
        ConfigError: there is more than one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{what} runs in one process; start it without a distributed launcher.")
