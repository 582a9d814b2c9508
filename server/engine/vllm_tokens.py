"""Between our rows and vLLM's requests: sampling parameters one way, tokens and log-probabilities the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import vllm
from vllm.sampling_params import RequestOutputKind

from ipissa.sampling import GREEDY

from .base import Row, SamplingParams, TokenLogprob, TokenOut
from .sampler import noise_key

END = {"stop": "stop", "length": "length"}


def to_vllm(row: Row, sampling: SamplingParams, end_ids: list[int]) -> vllm.SamplingParams:
    """vLLM's parameters of one row. Rows of one noise stream draw the same noise whatever their α."""
    echoes = sampling.echo and sampling.top_logprobs is not None
    return vllm.SamplingParams(
        max_tokens=max(1, sampling.max_tokens),  # vLLM must write one; `tokens_out` leaves it out
        temperature=sampling.temperature if sampling.temperature > GREEDY else 0.0,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=noise_key(sampling, row.noise, 0),
        stop_token_ids=end_ids,
        logprobs=sampling.top_logprobs,
        prompt_logprobs=sampling.top_logprobs if echoes else None,
        detokenize=False,  # stop strings and text are ours, so that they are the same on every engine
        output_kind=RequestOutputKind.DELTA,
    )


def next_token_distribution() -> vllm.SamplingParams:
    """Parameters that give log p of every token of the vocabulary right after a text.

    `logprob_token_ids` would ask for less, but in 0.32 it takes the log-probabilities that others in the same
    batch asked for away from them.
    """
    return vllm.SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprobs=-1,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def tokens_out(index: int, output: vllm.RequestOutput, row: Row, sampling: SamplingParams) -> Iterator[TokenOut]:
    """The tokens of one step of a row, usually one."""
    top = sampling.top_logprobs
    echoed = _prompt_logprobs(row, output.prompt_logprobs, top) if output.prompt_logprobs and top is not None else None
    completion = output.outputs[0]
    if sampling.max_tokens == 0:
        if completion.finish_reason in END:
            yield TokenOut(index, None, None, echoed, "length")
        return
    tokens = list(completion.token_ids)
    for i, token in enumerate(tokens):
        told = _logprob(token, completion.logprobs[i], top) if top is not None and completion.logprobs else None
        reason = END.get(completion.finish_reason or "") if i == len(tokens) - 1 else None
        yield TokenOut(index, token, told, echoed if i == 0 else None, reason)


def _prompt_logprobs(row: Row, found: Any, top: int) -> list[TokenLogprob]:
    """Of every prompt token but the first, which follows nothing."""
    return [_logprob(token, each, top) for token, each in zip(row.prompt_ids[1:], list(found)[1:], strict=True)]


def _logprob(token: int, found: Mapping[int, Any], top: int) -> TokenLogprob:
    """vLLM tells the likeliest and the chosen token in one mapping."""
    best = sorted(((each, value.logprob) for each, value in found.items()), key=lambda pair: -pair[1])
    return TokenLogprob(token, found[token].logprob, best[:top])
