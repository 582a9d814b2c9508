"""Choose which singular triples of a module an adapter may turn, from what they do on contrastive pairs.

All rules look at coordinates: x V (rows, k), what a module's inputs excite of each right singular
vector, for rows where the model acts out the chosen persona and rows where it acts out the other.
A module's outputs in its left singular basis are y U = S ∘ (x V), so scores of outputs multiply by
S, and "S-normed" scores are those of the coordinates themselves; dividing outputs by a small S is
never done, because rounding noise would win.

A rule returns indices only. The triples keep their own singular values: replacing S by projections
would leave the component in the frozen rest of the weight, where it cannot be rotated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ipissa.errors import ConfigError

LEARNT = "learnt"  # no rule: the directions are learnt with the rotation (`ipissa.adapter.frame`)
WITHOUT_PAIRS = (LEARNT, "top")  # what a PEFT adapter has as it is made
WITHOUT_TEXTS = (*WITHOUT_PAIRS, "random")  # what pairs of other texts would not change


@dataclass(frozen=True)
class TripleStatistics:
    """What selection knows of one module.

    Args:
        name: Full module name; with the seed, what the random rule draws by.
        S: Singular values, falling, (k,).
        chosen, rejected: Coordinates x V of the module's inputs, (rows, k), paired by row.
        stream_chosen, stream_rejected: The residual stream at the module in its basis on that side
            (U for modules that write to the stream, V for those that read it), (rows, k).
    """

    name: str
    S: Tensor
    chosen: Tensor
    rejected: Tensor
    stream_chosen: Tensor
    stream_rejected: Tensor
    seed: int = 0

    @property
    def difference(self) -> Tensor:
        """Chosen minus rejected coordinates, pair by pair, (rows, k)."""
        return self.chosen - self.rejected


def top(stats: TripleStatistics, r: int) -> Tensor:
    """The largest singular values, as PiSSA does."""
    return torch.arange(min(r, stats.S.numel()))


def random(stats: TripleStatistics, r: int) -> Tensor:
    """A permutation of its own for every module and seed of a run; a resumed run draws the same."""
    drawn = hashlib.blake2b(f"{stats.seed}:{stats.name}".encode(), digest_size=8).digest()
    seed = int.from_bytes(drawn, "big") >> 1
    return torch.randperm(stats.S.numel(), generator=torch.Generator().manual_seed(seed))[:r]


def dhs(stats: TripleStatistics, r: int) -> Tensor:
    """|mean(y_chosen - y_rejected) · U|: the triples along which the outputs differ most."""
    return _best((stats.S * stats.difference.mean(0)).abs(), r)


def mean_abs(stats: TripleStatistics, r: int) -> Tensor:
    """Half with the largest positive mean output difference, half with the largest negative."""
    return _halves_by_sign(stats.S * stats.difference.mean(0), (stats.S * stats.difference.mean(0)).abs(), r)


def mean_abs_snorm(stats: TripleStatistics, r: int) -> Tensor:
    """`mean_abs` of the coordinates themselves."""
    return _halves_by_sign(stats.difference.mean(0), stats.difference.mean(0).abs(), r)


def std(stats: TripleStatistics, r: int) -> Tensor:
    """Largest standard deviation of the output difference over pairs, half from each sign of its mean."""
    difference = stats.S * stats.difference
    return _halves_by_sign(difference.mean(0), difference.std(0), r)


def var(stats: TripleStatistics, r: int) -> Tensor:
    """Largest variance of the output difference over pairs, half from each sign of its mean."""
    difference = stats.S * stats.difference
    return _halves_by_sign(difference.mean(0), difference.var(0), r)


def var_snorm(stats: TripleStatistics, r: int) -> Tensor:
    """`var` of the coordinates themselves."""
    return _halves_by_sign(stats.difference.mean(0), stats.difference.var(0), r)


def cho_var_snorm(stats: TripleStatistics, r: int) -> Tensor:
    """Half by coordinate variance over chosen rows, then half over rejected rows."""
    return _in_turn([stats.chosen.var(0), stats.rejected.var(0)], [r - r // 2, r // 2])


def cho_var_raw(stats: TripleStatistics, r: int) -> Tensor:
    """`cho_var_snorm` of the outputs."""
    return _in_turn([(stats.S * stats.chosen).var(0), (stats.S * stats.rejected).var(0)], [r - r // 2, r // 2])


def chorej_var_snorm(stats: TripleStatistics, r: int) -> Tensor:
    """A third each by coordinate variance over chosen rows, rejected rows and their difference."""
    scores = [stats.chosen.var(0), stats.rejected.var(0), stats.difference.var(0)]
    return _in_turn(scores, [r - 2 * (r // 3), r // 3, r // 3])


def wanda_trip(stats: TripleStatistics, r: int) -> Tensor:
    """S times the mean size in the residual stream: a third each for chosen, rejected, |mean difference|.

    The thirds may overlap; what is missing then is filled by the best of the three scores, so that
    there are always exactly r.
    """
    scores = [
        stats.S * stats.stream_chosen.abs().mean(0),
        stats.S * stats.stream_rejected.abs().mean(0),
        stats.S * (stats.stream_chosen - stats.stream_rejected).mean(0).abs(),
    ]
    taken = torch.cat([_best(score, r // 3) for score in scores]).unique()
    return _in_turn([torch.stack(scores).amax(0)], [r - taken.numel()], taken)


SELECTIONS: dict[str, Callable[[TripleStatistics, int], Tensor]] = {
    rule.__name__: rule
    for rule in (
        top,
        random,
        dhs,
        mean_abs,
        mean_abs_snorm,
        std,
        var,
        var_snorm,
        cho_var_snorm,
        cho_var_raw,
        chorej_var_snorm,
        wanda_trip,
    )
}


def select(rule: str, stats: TripleStatistics, r: int) -> Tensor:
    """Indices of r triples by a rule of `SELECTIONS`, rising; all of them where the module has fewer.

    Raises:
        ConfigError: the activations are not finite, or of one pair only, so no ranking means anything.
    """
    if r >= stats.S.numel():
        return torch.arange(stats.S.numel())
    if rule not in WITHOUT_TEXTS and len(stats.chosen) < 2:
        raise ConfigError(f"1 pair does not show how activations vary for {rule}; give at least two suffixes.")
    for values in (stats.chosen, stats.rejected, stats.stream_chosen, stats.stream_rejected):
        if not values.isfinite().all():
            raise ConfigError(f"Activations of {stats.name} are not finite; load the model with --dtype float32.")
    return SELECTIONS[rule](stats, r).sort().values


def _best(score: Tensor, n: int) -> Tensor:
    return score.topk(n).indices


def _in_turn(scores: list[Tensor], counts: list[int], taken: Tensor | None = None) -> Tensor:
    """The best `counts[i]` by `scores[i]` that are not taken yet, after those that are."""
    chosen = torch.empty(0, dtype=torch.int64) if taken is None else taken
    for score, count in zip(scores, counts, strict=True):
        free = score.clone()
        free[chosen] = -torch.inf
        chosen = torch.cat([chosen, _best(free, count)])
    return chosen


def _halves_by_sign(sign_of: Tensor, score: Tensor, r: int) -> Tensor:
    """r/2 best where `sign_of` is positive, r/2 best where it is negative, the best others if a side runs out."""
    positive, negative = (sign_of > 0).nonzero()[:, 0], (sign_of < 0).nonzero()[:, 0]
    halves = [
        side[_best(score[side], min(n, side.numel()))] for side, n in ((positive, r - r // 2), (negative, r // 2))
    ]
    taken = torch.cat(halves)
    return _in_turn([score], [r - taken.numel()], taken)
