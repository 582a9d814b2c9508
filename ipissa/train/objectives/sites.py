"""Where a contrastive loss looks: one module's input or output, in the basis of its singular vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ipissa.adapter.layer import thin_svd
from ipissa.data.activations import by_rows
from ipissa.data.pairs import ContrastivePair
from ipissa.errors import ConfigError
from ipissa.sequences import PaddedBatch

SIDES = ("V", "U")  # what a module reads, what it writes


@dataclass(frozen=True)
class Site:
    """One module that is looked at but not adapted.

    Args:
        name: Full module name.
        module: The linear layer.
        side: `V` for its input x in the basis of its right singular vectors, x V; `U` for its output, y U.
        basis: V or U, (d, k) float32.
        S: Its singular values, (k,).
    """

    name: str
    module: nn.Module
    side: str
    basis: Tensor
    S: Tensor


def find_sites(model: Any, modules: Sequence[str], depths: Sequence[float], side: str) -> list[Site]:
    """The sites of those module names at those depths, fractions of the number of blocks in [0, 1).

    Raises:
        ConfigError: the model has no such module.
    """
    found = []
    for name, module in site_modules(model, modules, depths).items():
        u, s, v = thin_svd(module)
        found.append(Site(name, module, side, v if side == "V" else u, s))
    return found


def site_modules(model: Any, modules: Sequence[str], depths: Sequence[float]) -> dict[str, nn.Linear]:
    """The linear layers of those names at those depths, by full name.

    Raises:
        ConfigError: the model does not have all of them.
    """
    blocks = model.config.get_text_config().num_hidden_layers
    wanted = [f".{block}." for block in site_blocks(depths, blocks)]
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.endswith(tuple(f".{m}" for m in modules))
        and any(w in name for w in wanted)
    }
    if len(found) < len(modules) * len(wanted):
        raise ConfigError(f"Loss modules {list(modules)} are not all in this model; {len(found)} were found.")
    return found


def site_blocks(depths: Sequence[float], blocks: int) -> list[int]:
    """Block indices of depths given as fractions."""
    return sorted({min(int(depth * blocks), blocks - 1) for depth in depths})


@contextmanager
def recorded(sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """What every site sees while the model runs, with gradients; by name, (rows, length, d)."""
    seen: dict[str, Tensor] = {}

    def record(site: Site, value: Tensor) -> None:
        seen[site.name] = value

    with ExitStack() as stack:
        for site in sites:
            if site.side == "V":
                handle = site.module.register_forward_pre_hook(lambda _, args, site=site: record(site, args[0]))
            else:
                handle = site.module.register_forward_hook(lambda _, args, out, site=site: record(site, out))
            stack.callback(handle.remove)
        yield seen


def check_pairs(pairs: Sequence[ContrastivePair], last_tokens: int) -> None:
    """Refuse what would be read where it is padded, and what nothing can vary over.

    Raises:
        ConfigError: a row is shorter than `last_tokens`, or there is one pair only.
    """
    if len(pairs) < 2:
        raise ConfigError(f"{len(pairs)} pair does not show how activations vary; give at least two suffixes.")
    shortest = min(min(len(pair.chosen), len(pair.rejected)) + len(pair.opening) for pair in pairs)
    if last_tokens > shortest:
        raise ConfigError(f"last_tokens {last_tokens} is more than the {shortest} of the shortest pair; use fewer.")


def last_tokens(states: Tensor, batch: PaddedBatch, count: int) -> Tensor:
    """States (rows, length, d), or (rows · length, d), of every row's last `count` tokens; (rows, count, d) float32."""
    last = batch.input_ids.shape[1] - batch.targets.shape[1] + batch.mask.sum(-1) - 1
    index = last[:, None] - torch.arange(count - 1, -1, -1, device=last.device)
    return by_rows(states, len(last))[torch.arange(len(last), device=last.device)[:, None], index].float()


def last_mask(batch: PaddedBatch, count: int) -> Tensor:
    """True at the last `count` continuation tokens of every row, (rows, tokens)."""
    length = batch.mask.sum(-1, keepdim=True)
    return batch.mask & (torch.arange(batch.mask.shape[1], device=batch.mask.device) >= length - count)
