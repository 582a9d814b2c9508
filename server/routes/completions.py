"""POST /v1/completions."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..deps import EngineDep, SettingsDep, unless_disconnected
from ..engine.base import Engine, TokenLogprob
from ..errors import bad_request
from ..generate import build_request, collect, stream, token_ids, token_text, top_tokens, usage
from ..schemas import CompletionRequest, new_id, now
from ..steer import resolve_steer

router = APIRouter()


@router.post("/v1/completions", response_model=None)
async def completions(
    body: CompletionRequest, request: Request, engine: EngineDep, settings: SettingsDep
) -> dict[str, Any] | Response:
    """Continue a prompt, at one α, several, or a composition."""
    steer = resolve_steer(body.model, body.steer_alpha, dict(engine.adapters), settings)
    prompts = _prompt_ids(body, engine)
    job = build_request(
        body,
        prompts,
        steer,
        engine,
        max_tokens=16 if body.max_tokens is None else body.max_tokens,
        top_logprobs=body.logprobs,
        echo=body.echo or False,
    )
    head = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": now(),
        "model": body.model or settings.model,
        "steer_adapters": steer.digests,
    }

    def choice(row: int, text: str, finish_reason: str | None, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        return {
            "index": row,
            "text": text,
            "logprobs": None if body.logprobs is None else _logprobs(engine, logprobs),
            "finish_reason": finish_reason,
            "steer": dict(job.rows[row].steer),
            **token_ids(body, logprobs, job.rows[row].prompt_ids),
        }

    if body.stream:

        def closing(tokens: int) -> list[dict[str, Any]]:
            wanted = body.stream_options and body.stream_options.include_usage
            return [{**head, "choices": [], "usage": usage(prompts, tokens).model_dump()}] if wanted else []

        return await stream(
            request,
            engine,
            job,
            opening=[],
            chunk=lambda delta: {
                **head,
                "choices": [choice(delta.row, delta.text, delta.finish_reason, delta.logprobs)],
            },
            closing=closing,
        )
    rows = await unless_disconnected(request, collect(engine, job))
    choices = [choice(i, row.text, row.finish_reason, row.logprobs) for i, row in enumerate(rows)]
    return {**head, "choices": choices, "usage": usage(prompts, sum(row.tokens for row in rows)).model_dump()}


def _prompt_ids(body: CompletionRequest, engine: Engine) -> list[list[int]]:
    """Token ids of every prompt."""
    prompt = body.prompt
    if not prompt:
        raise bad_request("prompt is empty; give at least one token.", param="prompt")
    if isinstance(prompt, str):
        return [engine.tokenizer.encode(prompt)]
    if isinstance(prompt[0], int):
        return [prompt]
    return [engine.tokenizer.encode(each) if isinstance(each, str) else each for each in prompt]


def _logprobs(engine: Engine, found: list[TokenLogprob]) -> dict[str, Any]:
    """OpenAI's log-probabilities of completions: four parallel lists. A prompt's first token has none."""
    tokens = [token_text(engine, each.token_id) for each in found]
    return {
        "tokens": tokens,
        "token_logprobs": [each.logprob for each in found],
        "top_logprobs": [None if each.logprob is None else dict(top_tokens(engine, each)) for each in found],
        "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
    }
