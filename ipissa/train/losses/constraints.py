"""Keep text coherent and the dial ordered while something else pushes the poles apart."""

from __future__ import annotations

import torch
from torch import Tensor

from ipissa.train.losses.separation import masked_mean

TV_SCALE = 0.9
TV_OFFSET = 0.02


def coherence_penalty(
    logp_ref: Tensor, logp: Tensor, mask: Tensor, *, threshold: float = 0.5, weight: float = 40.0
) -> Tensor:
    """mean over tokens of weight · log(1 + relu(logp_ref - logp - threshold)), per row.

    Per token, so that one token that became easier cannot pay for others that became harder.

    Args:
        logp_ref, logp: Log-probabilities of the given tokens, adapter off and on, (rows, tokens), in nats.
        mask: (rows, tokens).
        threshold: Nats a token may lose for nothing.
    """
    return masked_mean(weight * torch.relu(logp_ref - logp - threshold).log1p(), mask)


def total_variation_barrier(
    logprobs: Tensor, top_ids: Tensor, top_logprobs: Tensor, entropy: Tensor, mask: Tensor, *, weight: float = 10.0
) -> Tensor:
    """mean over tokens of log(1 + weight v)² + v, v = relu(TV - 0.9 √(H + 0.02)), per row (AntiPaSTO).

    TV is the total-variation distance of the next-token distributions with the adapter on and off,
    H the entropy of the latter in nats: where the model is sure, little may change. Above
    H = 1.21 nats the threshold exceeds 1 and nothing is held. The reference is kept as its likeliest
    tokens; the rest counts as one class, which bounds TV from below and is exact for k = vocab.

    Args:
        logprobs: With the adapter on, (rows, tokens, vocab).
        top_ids, top_logprobs: The reference, (rows, tokens, k).
        entropy: The reference's, (rows, tokens).
        mask: (rows, tokens).
        weight: 0 leaves the barrier out.
    """
    if not weight:
        return logprobs.new_zeros(len(logprobs))
    p_ref, p = top_logprobs.exp(), logprobs.gather(-1, top_ids).exp()
    variation = ((p_ref - p).abs().sum(-1) + (p_ref.sum(-1) - p.sum(-1)).abs()) / 2
    excess = torch.relu(variation - TV_SCALE * (entropy + TV_OFFSET).sqrt())
    return masked_mean((weight * excess).log1p() ** 2 + excess, mask)


def monotonic_hinge(
    gap_negative: Tensor,
    gap_positive: Tensor,
    *,
    margin: float | Tensor = 0.05,
    weight: float = 100.0,
    either_way: bool = True,
) -> Tensor:
    """weight · min(F, B): the preference gap must lie on different sides of 0 at the two poles, either way round.

    F = mean[relu(g(-1) + m) + relu(m - g(+1))], B with the poles exchanged; g(0) = 0 by construction.
    The smaller of the two counts, so that nothing decides in advance which pole is which; F alone if not `either_way`.

    Args:
        gap_negative, gap_positive: g(-1) and g(+1), the change against α = 0 of
            log p(chosen) - log p(rejected), (pairs,).
        margin: In nats, one number or (pairs,).
    """
    forward = (torch.relu(gap_negative + margin) + torch.relu(margin - gap_positive)).mean()
    if not either_way:
        return weight * forward
    backward = (torch.relu(margin - gap_negative) + torch.relu(gap_positive + margin)).mean()
    return weight * torch.minimum(forward, backward)


def adaptive_weights(loss_positive: Tensor, loss_negative: Tensor, *, temperature: float = 4.0) -> Tensor:
    """min(1, 2 softmax(-[L₊, L₋] / T)), (2,): the coherence of the pole that lags is relaxed, detached."""
    losses = torch.stack([loss_positive.detach(), loss_negative.detach()])
    return (2 * (-losses / temperature).softmax(0)).clamp(max=1)


def ramp(step: int, total: int, *, fraction: float = 0.2) -> float:
    """0 at step 0, rising linearly to 1 at `fraction` of training; 1 at once for fraction 0."""
    return min(1.0, step / (fraction * total)) if fraction * total > 0 else 1.0
