"""From logits to tokens: filters that keep part of a distribution, and noise that α does not change.

All functions take one row of settings per row of logits, so requests with different settings can share
a batch. A token is chosen by the Gumbel-max trick, argmax(log p + g): with the same noise g, two
distributions give the same token wherever their difference does not decide, which is what makes
generations at two α comparable token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUCLEUS_CANDIDATES = 512
GREEDY = 1e-5  # temperatures up to this choose the likeliest token: dividing by less only overflows


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits / temperature per row; temperature (rows,), where `GREEDY` leaves the row as it is (it is argmaxed)."""
    return logits / torch.where(temperature > GREEDY, temperature, 1.0)[:, None]


def keep_top_k(logits: Tensor, k: Sequence[int]) -> Tensor:
    """-inf outside each row's k most likely tokens; 0 keeps all."""
    if not any(k):
        return logits
    widest = min(max(k), logits.shape[-1])
    top = logits.topk(widest, dim=-1).values
    rank = torch.tensor([min(each, widest) if each > 0 else 1 for each in k], device=logits.device)
    floor = top.gather(-1, (rank - 1)[:, None])
    unlimited = torch.tensor([each <= 0 for each in k], device=logits.device)[:, None]
    return logits.masked_fill((logits < floor) & ~unlimited, -torch.inf)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """-inf outside each row's smallest set of likeliest tokens with mass at least p; p (rows,) in (0, 1].

    Sorting a whole vocabulary costs more than a decode step on a CPU, so the mass is looked for among
    the likeliest few hundred tokens first; rows where that is not enough are sorted in full.
    """
    if bool((p >= 1).all()):
        return logits
    total = logits.logsumexp(-1, keepdim=True)
    candidates = min(NUCLEUS_CANDIDATES, logits.shape[-1])
    top = logits.topk(candidates, dim=-1).values
    if bool((((top - total).exp().sum(-1) < p) & (p < 1)).any()):
        top = logits.sort(dim=-1, descending=True).values
    mass_before = (top - total).exp().cumsum(-1) - (top - total).exp()
    kept = (mass_before < p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    floor = top.gather(-1, kept - 1)
    return logits.masked_fill((logits < floor) & (p < 1)[:, None], -torch.inf)


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """-inf where a token is less likely than p times the likeliest; p (rows,) in [0, 1]."""
    if not bool(p.any()):
        return logits
    floor = logits.max(-1, keepdim=True).values + p.log()[:, None]
    return logits.masked_fill(logits < floor, -torch.inf)


def gumbel_noise(generator: torch.Generator, vocab: int) -> Tensor:
    """One draw of standard Gumbel noise for every token, (vocab,), on the CPU."""
    exponential = torch.empty(vocab).exponential_(generator=generator)
    return -exponential.clamp(min=torch.finfo(torch.float32).tiny).log()
