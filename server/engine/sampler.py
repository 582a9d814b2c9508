"""Choose the next token of every row of one request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ipissa.sampling import apply_temperature, gumbel_noise, keep_min_p, keep_top_k, keep_top_p

from .base import SamplingParams, TokenLogprob


class Sampler:
    """Draws tokens under one request's sampling parameters.

    Noise is drawn once per step for every stream, by a generator seeded with (seed, stream), and
    shared by the rows of that stream: the noise at step t does not depend on α, on other requests,
    or on which rows have finished.
    """

    def __init__(self, params: SamplingParams, noise_streams: Sequence[int], vocab: int) -> None:
        self._params = params
        self._vocab = vocab
        self._generators = {
            stream: torch.Generator().manual_seed((params.seed * 1_000_003 + stream) % 2**63)
            for stream in sorted(set(noise_streams))
        }

    def choose(self, logits: Tensor, noise_streams: Sequence[int], generated: Sequence[Sequence[int]]) -> Tensor:
        """Next token per row; logits (rows, vocab) float32, `generated` the tokens of each row so far -> (rows,)."""
        logits = self._penalised(logits, generated)
        if self._params.temperature == 0:
            return logits.argmax(-1)
        rows = logits.new_ones(logits.shape[0])
        logits = apply_temperature(logits, rows * self._params.temperature)
        logits = keep_top_k(logits, [self._params.top_k] * len(rows))
        logits = keep_top_p(logits, rows * self._params.top_p)
        logits = keep_min_p(logits, rows * self._params.min_p)
        noise = {stream: gumbel_noise(generator, self._vocab) for stream, generator in self._generators.items()}
        return (logits + torch.stack([noise[stream] for stream in noise_streams]).to(logits.device)).argmax(-1)

    def _penalised(self, logits: Tensor, generated: Sequence[Sequence[int]]) -> Tensor:
        """Logit bias, and OpenAI's penalties: frequency times the count so far, presence once."""
        params = self._params
        if not (params.logit_bias or params.presence_penalty or params.frequency_penalty):
            return logits
        logits = logits.clone()
        for token, bias in params.logit_bias.items():
            logits[:, token] += bias
        for row, tokens in zip(logits, generated, strict=True):
            if tokens and (params.presence_penalty or params.frequency_penalty):
                ids, counts = torch.tensor(tokens, device=row.device).unique(return_counts=True)
                row[ids] -= params.frequency_penalty * counts + params.presence_penalty
        return logits


def token_logprobs(logits: Tensor, chosen: Tensor, top: int) -> list[TokenLogprob]:
    """The model's own log-probabilities of the chosen tokens and the `top` likeliest; logits (rows, vocab)."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, chosen[:, None])[:, 0].tolist()
    best = logprobs.topk(top, dim=-1) if top else None
    return [
        TokenLogprob(
            token_id=token,
            logprob=own[row],
            top=[] if best is None else list(zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)),
        )
        for row, token in enumerate(chosen.tolist())
    ]
