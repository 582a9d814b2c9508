"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..deps import EngineDep, SettingsDep
from ..engine.base import Engine, TokenLogprob
from ..errors import bad_request
from ..generate import build_request, check_rows, respond, token_ids
from ..offsets import TextOffsets
from ..schemas import CompletionRequest, new_id, now
from ..steer import resolve_steer
from ..token_texts import token_text

router = APIRouter()


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionRequest, request: Request, engine: EngineDep, settings: SettingsDep) -> Response:
    """Continue a prompt, at one α, several, or a composition."""
    steer = resolve_steer(body.model, body.steer_alpha, dict(engine.adapters), settings)
    echo = body.echo or False
    asked = _prompts(body)
    check_rows(len(asked), steer, body, engine)
    prompts = await asyncio.to_thread(_prompt_ids, asked, engine)
    job = build_request(
        body,
        prompts,
        steer,
        engine,
        top_logprobs=body.logprobs,
        echo=echo,
    )
    head = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": now(),
        "model": body.model or settings.model,
        "steer_adapters": steer.digests,
    }

    offsets: dict[int, TextOffsets] = {}  # of the rows that were told of before

    def choice(row: int, text: str, finish_reason: str | None, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        prompt = None if row in offsets else job.rows[row].prompt_ids
        if prompt is not None:
            offsets[row] = TextOffsets(engine.tokenizer, prompt, echo=echo)
        return {
            "index": row,
            "text": text,
            "logprobs": None if body.logprobs is None else _logprobs(engine, logprobs, offsets[row]),
            "finish_reason": finish_reason,
            "steer": dict(job.rows[row].steer),
            **token_ids(body, logprobs, prompt),
        }

    return await respond(
        request,
        engine,
        body,
        job,
        prompts,
        head=head,
        choice=lambda row, answer: choice(row, answer.text, answer.finish_reason, answer.logprobs),
        chunk_head=head,
        chunk_choice=lambda delta: choice(delta.row, delta.text, delta.finish_reason, delta.logprobs),
    )


def _prompts(body: CompletionRequest) -> list[str] | list[list[int]]:
    """Every prompt as it was given."""
    prompt = body.prompt
    if not prompt:
        raise bad_request("prompt is empty; give at least one token.", param="prompt")
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt  # type: ignore[return-value]


def _prompt_ids(prompts: list[str] | list[list[int]], engine: Engine) -> list[list[int]]:
    """Token ids of every prompt."""
    return [engine.tokenizer.encode(each) if isinstance(each, str) else each for each in prompts]


def _logprobs(engine: Engine, found: list[TokenLogprob], offsets: TextOffsets) -> dict[str, Any]:
    """OpenAI's log-probabilities of completions: four parallel lists. A prompt's first token has none."""
    return {
        "tokens": [token_text(engine.tokenizer, each.token_id) for each in found],
        "token_logprobs": [each.logprob for each in found],
        "top_logprobs": [None if each.logprob is None else _top(engine, each) for each in found],
        "text_offset": offsets.of([each.token_id for each in found]),
    }


def _top(engine: Engine, logprob: TokenLogprob) -> dict[str, float]:
    """The likeliest alternatives by text; of those that read alike, the likeliest."""
    found: dict[str, float] = {}
    for token, value in logprob.top:
        found.setdefault(token_text(engine.tokenizer, token), value)
    return found
