"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from typing import Any

import jinja2
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ipissa.data.chat import chat_ids

from ..deps import EngineDep, SettingsDep
from ..engine.base import Delta, Engine, TokenLogprob
from ..errors import bad_request
from ..generate import FinishedRow, build_request, check_rows, respond, token_ids
from ..schemas import ChatMessage, ChatRequest, new_id, now
from ..steer import resolve_steer
from ..token_texts import token_bytes, token_text

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(body: ChatRequest, request: Request, engine: EngineDep, settings: SettingsDep) -> Response:
    """Answer a conversation, at one α, several, or a composition."""
    steer = resolve_steer(body.model, body.steer_alpha, dict(engine.adapters), settings)
    check_rows(1, steer, body, engine)
    prompts = [await asyncio.to_thread(conversation_ids, engine, body.messages)]
    job = build_request(
        body,
        prompts,
        steer,
        engine,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    head: dict[str, Any] = {
        "id": new_id("chatcmpl"),
        "created": now(),
        "model": body.model or settings.model,
        "steer_adapters": steer.digests,
    }
    chunk_head = {**head, "object": "chat.completion.chunk"}
    prompt_ids = {"prompt_token_ids": prompts[0]} if body.return_token_ids else {}

    def choice(row: int, finish_reason: str | None, found: list[TokenLogprob], **content: Any) -> dict[str, Any]:
        logprobs = {"content": _logprobs(engine, found), "refusal": None} if body.logprobs else None
        return {
            "index": row,
            **content,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "steer": dict(job.rows[row].steer),
            **token_ids(body, found),
        }

    def message(row: int, answer: FinishedRow) -> dict[str, Any]:
        return choice(row, answer.finish_reason, answer.logprobs, message={"role": "assistant", "content": answer.text})

    def part(delta: Delta) -> dict[str, Any]:
        return choice(delta.row, delta.finish_reason, delta.logprobs, delta={"content": delta.text})

    roles = [choice(row, None, [], delta={"role": "assistant", "content": ""}) for row in range(len(job.rows))]
    opening = [{**chunk_head, "choices": [role]} for role in roles]
    opening[0] |= prompt_ids
    return await respond(
        request,
        engine,
        body,
        job,
        prompts,
        head={**head, **prompt_ids, "object": "chat.completion"},
        choice=message,
        chunk_head=chunk_head,
        chunk_choice=part,
        opening=opening,
    )


def conversation_ids(engine: Engine, messages: list[ChatMessage], prefill: str = "") -> list[int]:
    """Token ids of a conversation, up to where the assistant speaks or after what it has begun with."""
    if engine.tokenizer.chat_template is None:
        raise bad_request(
            "This model has no chat template, so it takes no messages; use /v1/completions or give a prompt.",
            param="messages",
        )
    try:
        return chat_ids(engine.tokenizer, [message.plain() for message in messages], prefill)
    except jinja2.TemplateError as error:
        raise bad_request(f"The model's chat template refuses these messages: {error}.", param="messages") from error


def _logprobs(engine: Engine, found: list[TokenLogprob]) -> list[dict[str, Any]]:
    """OpenAI's log-probabilities of chat: one object per token."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text, spelt = token_text(engine.tokenizer, token_id), token_bytes(engine.tokenizer, token_id)
        return {"token": text, "logprob": logprob, "bytes": list(spelt)}

    return [
        {**entry(each.token_id, each.logprob), "top_logprobs": [entry(token, value) for token, value in each.top]}
        for each in found
    ]
