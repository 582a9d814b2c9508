"""What completions and chat share: build the engine's request, run it, and write it out.

Rows are laid out prompt by prompt, then α by α, then by n; a choice's index is its row.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.sse import format_sse_event

from ipissa.errors import IpissaError

from .deps import unless_disconnected
from .engine.base import Delta, Engine, GenerationRequest, Row, SamplingParams, TokenLogprob
from .errors import bad_request, error_body, to_api_error
from .schemas import GenerationBody, Usage
from .steer import SteerSpec

logger = logging.getLogger(__name__)
Chunk = dict[str, Any]


@dataclass
class FinishedRow:
    """A row's whole answer."""

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


def check_rows(prompts: int, steer: SteerSpec, body: GenerationBody, engine: Engine) -> None:
    """400 if there are too many rows; asked before the prompts are tokenized, which takes long if there are many."""
    n = body.n or 1
    rows_asked = prompts * len(steer.settings) * n
    if rows_asked > engine.max_batch:
        raise bad_request(
            f"{prompts} prompts x {len(steer.settings)} α x n = {n} make {rows_asked} sequences; "
            f"this server takes at most {engine.max_batch} in one request."
        )


def build_request(
    body: GenerationBody,
    prompts: list[list[int]],
    steer: SteerSpec,
    engine: Engine,
    *,
    top_logprobs: int | None,
    echo: bool = False,
) -> GenerationRequest:
    """The rows of a request, whose number `check_rows` allows, checked against what the engine can hold."""
    n = body.n or 1
    limit, max_tokens = body.length
    rows_asked = len(prompts) * len(steer.settings) * n
    longest = max(map(len, prompts))
    needed = 1 if max_tokens is None else max_tokens
    if min(map(len, prompts)) == 0:
        raise bad_request(f"{body.asked_in} is empty; give at least one token.", param=body.asked_in)
    if longest + needed > engine.max_model_len:
        raise bad_request(
            f"The prompt's {longest} tokens and {limit} {needed} exceed this model's limit of "
            f"{engine.max_model_len} tokens.",
            param=body.asked_in if longest >= engine.max_model_len else limit,
        )
    if rows_asked * (longest + 1) > engine.max_cache_tokens:
        raise bad_request(
            f"{rows_asked} sequences with a prompt of {longest} tokens need more than the {engine.max_cache_tokens} "
            "tokens this server keeps in memory; ask for fewer at a time.",
            param=body.asked_in,
        )
    vocab = engine.vocab_size
    for token in [*(body.logit_bias or {}), *(token for prompt in prompts for token in prompt)]:
        if not 0 <= token < vocab:
            raise bad_request(f"The token id {token} is not in the vocabulary of {vocab} tokens.")
    rows = [
        Row(prompt_ids=ids, steer=setting, noise=p * n + i)
        for p, ids in enumerate(prompts)
        for setting in steer.settings
        for i in range(n)
    ]
    sampling = SamplingParams(
        max_tokens=engine.max_model_len - longest if max_tokens is None else max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        stop=tuple(body.stop),
        # The engine tells tokens with their log-probabilities.
        top_logprobs=0 if top_logprobs is None and body.return_token_ids else top_logprobs,
        echo=echo,
    )
    return GenerationRequest(rows, sampling, steer.digests)


def usage(prompts: list[list[int]], completion_tokens: int) -> Usage:
    """Token counts of a response."""
    read = sum(map(len, prompts))
    return Usage(prompt_tokens=read, completion_tokens=completion_tokens, total_tokens=read + completion_tokens)


async def respond(
    client: Request,
    engine: Engine,
    body: GenerationBody,
    request: GenerationRequest,
    prompts: list[list[int]],
    *,
    head: Chunk,
    choice: Callable[[int, FinishedRow], Chunk],
    chunk_head: Chunk,
    chunk_choice: Callable[[Delta], Chunk],
    opening: list[Chunk] | None = None,
) -> Response:
    """Run a request and answer it, whole or streamed, as the body asks.

    Args:
        head: What an answer has beside its choices and its usage.
        choice: Of a finished row.
        chunk_head: What every chunk has beside its choices.
        chunk_choice: Of what one step adds to a row.
        opening: Chunks before the first that has text.
    """
    if body.stream:
        usage_asked = body.stream_options is not None and body.stream_options.include_usage
        return await _stream(
            client,
            engine,
            request,
            opening=opening or [],
            chunk=lambda delta: {**chunk_head, "choices": [chunk_choice(delta)]},
            closing=lambda tokens: (
                [{**chunk_head, "choices": [], "usage": usage(prompts, tokens).model_dump()}] if usage_asked else []
            ),
        )
    rows = await unless_disconnected(client, _collect(engine, request))

    def whole() -> Response:
        total = usage(prompts, sum(row.tokens for row in rows)).model_dump()
        return JSONResponse({**head, "choices": [choice(i, row) for i, row in enumerate(rows)], "usage": total})

    # Log-probabilities may make it large, which must not hold up the event loop.
    return await asyncio.to_thread(whole)


async def _collect(engine: Engine, request: GenerationRequest) -> list[FinishedRow]:
    """Run a request to its end."""
    rows = [FinishedRow() for _ in request.rows]
    async with aclosing(engine.generate(request)) as steps:  # type: ignore[type-var]
        async for deltas in steps:
            for delta in deltas:
                row = rows[delta.row]
                row.text += delta.text
                row.tokens += delta.tokens
                row.finish_reason = delta.finish_reason
                row.logprobs += delta.logprobs
    return rows


async def _stream(
    client: Request,
    engine: Engine,
    request: GenerationRequest,
    *,
    opening: list[Chunk],
    chunk: Callable[[Delta], Chunk],
    closing: Callable[[int], list[Chunk]],
) -> StreamingResponse:
    """Server-sent events: the opening chunks, one per delta, the closing ones, and [DONE].

    The response begins with the first token, so that a refusal or a failed prefill still has its own
    HTTP status. A client that hangs up closes the generator, which cancels the request. A later error
    is sent as an event in OpenAI's error form.
    """
    steps = engine.generate(request)
    first = await unless_disconnected(client, anext(steps))

    async def events() -> AsyncIterator[bytes]:
        tokens, deltas = 0, first
        try:
            for each in opening:
                yield _event(each)
            async with aclosing(steps):  # type: ignore[type-var]
                while deltas:
                    tokens += sum(delta.tokens for delta in deltas)
                    for delta in deltas:
                        yield _event(chunk(delta))
                    deltas = await anext(steps, [])
            for each in closing(tokens):
                yield _event(each)
        except Exception as error:
            if not isinstance(error, IpissaError):  # those say all there is to say
                logger.exception("A stream failed")
            yield _event(error_body(to_api_error(error)))
        yield format_sse_event(data_str="[DONE]")

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _event(data: Chunk) -> bytes:
    # Escaped: unlike JSON, events take U+2028 and its like for line breaks.
    return format_sse_event(data_str=json.dumps(data))


def token_ids(body: GenerationBody, found: list[TokenLogprob], prompt: list[int] | None = None) -> dict[str, list[int]]:
    """What `return_token_ids` adds to a choice, under the names vLLM gives it; nothing unless it was asked for."""
    if not body.return_token_ids:
        return {}
    ids = {"token_ids": [each.token_id for each in found]}
    return ids if prompt is None else {"prompt_token_ids": prompt, **ids}
