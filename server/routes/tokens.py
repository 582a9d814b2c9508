"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter

from ..deps import EngineDep, SettingsDep
from ..errors import bad_request
from ..schemas import DetokenizeBody, TokenizeBody
from ..steer import check_model
from .chat import conversation_ids

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, engine: EngineDep, settings: SettingsDep) -> dict[str, Any]:
    """Token ids of a prompt or a conversation."""
    check_model(body.model, engine.adapters, settings)
    if body.messages is not None:
        read = partial(conversation_ids, engine, body.messages)
    else:
        read = partial(engine.tokenizer.encode, body.prompt, add_special_tokens=body.add_special_tokens)
    tokens = await asyncio.to_thread(read)  # which must not hold up the event loop
    return {"tokens": tokens, "count": len(tokens), "max_model_len": engine.max_model_len}


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, engine: EngineDep, settings: SettingsDep) -> dict[str, str]:
    """The text of token ids, special tokens included."""
    check_model(body.model, engine.adapters, settings)
    vocab = engine.vocab_size
    for token in body.tokens:
        if token >= vocab:
            raise bad_request(f"The token id {token} is not in the vocabulary of {vocab} tokens.", param="tokens")
    return {"prompt": await asyncio.to_thread(engine.tokenizer.decode, body.tokens)}
