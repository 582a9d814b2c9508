"""Choose the next token of every sequence in a batch, each by its own sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from hashlib import blake2b

import torch
from torch import Tensor

from ipissa.sampling import GREEDY, apply_temperature, gumbel_noise, keep_min_p, keep_top_k, keep_top_p

from .base import SamplingParams, TokenLogprob
from .sequence import Sequence


def choose_tokens(logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """Next token per sequence; logits (sequences, vocab) float32 -> (sequences,)."""
    logits = _with_bias_and_penalties(logits, sequences)
    chosen = logits.argmax(-1)
    sampled = [i for i, sequence in enumerate(sequences) if sequence.sampling.temperature > GREEDY]
    if sampled:
        rows = torch.tensor(sampled, device=logits.device)
        chosen[rows] = _draw(logits[rows], [sequences[i] for i in sampled])
    return chosen


def _draw(logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """Sample every row within its filters, by the Gumbel-max trick."""
    params = [sequence.sampling for sequence in sequences]

    def column(name: str) -> Tensor:
        return logits.new_tensor([getattr(each, name) for each in params])

    logits = apply_temperature(logits, column("temperature"))
    logits = keep_top_k(logits, [each.top_k for each in params])
    logits = keep_top_p(logits, column("top_p"))
    logits = keep_min_p(logits, column("min_p"))
    return (logits + _noise(sequences, logits.shape[-1]).to(logits.device)).argmax(-1)


def _noise(sequences: Seq[Sequence], vocab: int) -> Tensor:
    """Gumbel noise per row, (rows, vocab), equal for rows of one noise stream at the same token.

    It is a function of the request's seed, the stream and how many tokens the sequence has, and of
    nothing else: not of α, not of other requests, not of when the sequence ran.
    """
    keys = [noise_key(sequence.sampling, sequence.spec.noise, sequence.generated) for sequence in sequences]
    drawn = {key: gumbel_noise(torch.Generator().manual_seed(key), vocab) for key in dict.fromkeys(keys)}
    return torch.stack([drawn[key] for key in keys])


def noise_key(params: SamplingParams, stream: int, token: int) -> int:
    """The seed of the noise that chooses the token of that index in that stream."""
    digest = blake2b(f"{params.seed} {stream} {token}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _with_bias_and_penalties(logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """Logit bias, and OpenAI's penalties: frequency times the count so far, presence once."""
    if not any(each.sampling.changes_logits for each in sequences):
        return logits
    logits = logits.clone()
    for row, sequence in zip(logits, sequences, strict=True):
        params = sequence.sampling
        if params.logit_bias:
            row.index_add_(0, *sequence.job.logit_bias(row.device))
        if sequence.generated and (params.presence_penalty or params.frequency_penalty):
            written = torch.tensor(sequence.tokens[sequence.prompt_length :], device=row.device)
            ids, counts = written.unique(return_counts=True)
            row[ids] -= params.frequency_penalty * counts + params.presence_penalty
    return logits


def token_logprobs(logits: Tensor, chosen: Tensor, tops: Seq[int]) -> list[TokenLogprob]:
    """The model's own log-probabilities of the chosen tokens and of the likeliest.

    Args:
        logits: (rows, vocab), as they left the model.
        chosen: (rows,).
        tops: How many of the likeliest to report, per row.
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, chosen[:, None])[:, 0].tolist()
    best = logprobs.topk(max(tops), dim=-1)
    ids, values = best.indices.tolist(), best.values.tolist()
    return [
        TokenLogprob(token, own[row], list(zip(ids[row][:top], values[row][:top], strict=True)))
        for row, (token, top) in enumerate(zip(chosen.tolist(), tops, strict=True))
    ]
