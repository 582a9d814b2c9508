"""Low-dimensional subspaces of the residual stream, as orthonormal columns (d, k)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_COSINE = 0.5
SPOKEN_SHARE = 1 / 16  # of the width: leading directions of the unembedding, said rather than suppressed


def task_subspace(difference: Tensor, k: int) -> Tensor:
    """Leading directions of the pair differences dHS (pairs, d), uncentred: their mean is the trait."""
    return torch.linalg.svd(difference, full_matrices=False).Vh[:k].T


def suppressed_subspace(states: Tensor, unembedding: Tensor, k: int) -> Tensor:
    """Directions that blocks write and later blocks erase, outside what the unembedding reads most.

    Along a direction u, steps Δ that go one way and back have Σ (u·Δ)² above (u·ΣΔ)². So what counts is the excess of
    what is done, step by step, over the net change, summed over rows:

        M = ½ Σ_rows (Σ_l Δ_l Δ_lᵀ - (Σ_l Δ_l) (Σ_l Δ_l)ᵀ) = -½ Σ_rows Σ_{l≠m} Δ_l Δ_mᵀ

    whose leading eigenvectors are taken as far as their eigenvalues are positive. The successor's Σ relu(Δ) -
    Σ relu(-Δ) is the net change itself, dimension by dimension of a basis that means nothing.

    What is read most is a share of the width: the successor's 256 directions are 36 at a width of 576,
    where 256 would be half of the stream and, with it, what the personas differ in.

    Args:
        states: Residual stream after every block, (layers, rows, d).
        unembedding: (vocab, d).

    Returns:
        (d, ≤ k).
    """
    count = round(SPOKEN_SHARE * unembedding.shape[1])
    said = _leading(unembedding.T @ unembedding, count)
    steps = states.diff(dim=0)
    steps = steps - steps @ said @ said.T
    net, every = steps.sum(0), steps.flatten(0, 1)
    return _leading((every.T @ every - net.T @ net) / 2, k)


def _leading(symmetric: Tensor, k: int) -> Tensor:
    """Eigenvectors of the k largest positive eigenvalues, the largest first, (d, ≤ k)."""
    values, vectors = torch.linalg.eigh(symmetric)
    largest = slice(max(len(values) - k, int((values <= 0).sum())), None)
    return vectors[:, largest].flip(1)


def writable_subspace(weights: Sequence[Tensor], k: int) -> Tensor:
    """Leading left singular directions of the weights (d, d_in) that write to the stream, together."""
    return torch.linalg.svd(torch.cat([weight.float() for weight in weights], dim=1), full_matrices=False).U[:, :k]


def intersect(a: Tensor, b: Tensor) -> Tensor:
    """Bisectors of the principal vectors of two subspaces (d, k) and (d, m) less than 60° apart, (d, ≤ min(k, m)).

    By the SVD of aᵀ b, whose singular values are the cosines of the principal angles.
    """
    left, cosines, right = torch.linalg.svd(a.T @ b, full_matrices=False)
    near = cosines > MIN_COSINE
    bisectors = a @ left[:, near] + b @ right[near].T
    return torch.linalg.qr(bisectors).Q if near.any() else a[:, :0]
