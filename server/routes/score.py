"""POST /v1/score: what the model would choose, at one α or at many."""

from __future__ import annotations

import asyncio
import reprlib

from fastapi import APIRouter, Request

from ipissa.evaluate.scoring import find_choices

from ..deps import EngineDep, SettingsDep, unless_disconnected
from ..engine.base import Engine, ScoreRequest
from ..errors import bad_request
from ..generate import usage
from ..schemas import ScoreBody, ScoreEntry, ScoreResponse, new_id, now
from ..steer import resolve_steer
from .chat import conversation_ids

router = APIRouter()
MAX_SWEEP = 1024
MAX_CHOICE_TOKENS = 64


@router.post("/v1/score")
async def score(body: ScoreBody, request: Request, engine: EngineDep, settings: SettingsDep) -> ScoreResponse:
    """Log-probabilities of the choices right after the prefix, per α."""
    steer = resolve_steer(body.model, body.steer_alpha, dict(engine.adapters), settings)
    if len(steer.settings) > MAX_SWEEP:
        raise bad_request(f"steer_alpha lists {len(steer.settings)} α; give at most {MAX_SWEEP}.", param="steer_alpha")
    context = await asyncio.to_thread(_context_ids, engine, body)
    if not 0 < len(context) < engine.max_model_len:
        raise bad_request(
            f"The prompt has {len(context)} tokens; give between 1 and {engine.max_model_len - 1}.",
            param="messages" if body.messages else "prompt",
        )
    await asyncio.to_thread(_check_choices, engine, body.choices, len(context))
    asked = ScoreRequest(context, body.choices, steer.settings, steer.digests)
    scores = await unless_disconnected(request, engine.score(asked))
    return ScoreResponse(
        id=new_id("score"),
        created=now(),
        model=body.model or settings.model,
        choices=body.choices,
        data=[
            ScoreEntry(
                index=i,
                steer=dict(setting),
                logprobs=each.logprobs,
                log_odds=each.log_odds,
                choice_mass=each.choice_mass,
            )
            for i, (setting, each) in enumerate(zip(steer.settings, scores, strict=True))
        ],
        steer_adapters=steer.digests,
        usage=usage([context], 0),
    )


def _context_ids(engine: Engine, body: ScoreBody) -> list[int]:
    """The tokens the choice follows: the conversation and the prefix, or the prompt, a line break and the prefix."""
    if body.messages is not None:
        return conversation_ids(engine, body.messages, body.prefix)
    prompt = body.prompt or ""
    gap = "\n" if prompt and body.prefix and not prompt[-1].isspace() else ""
    return engine.tokenizer.encode(prompt + gap + body.prefix)


def _check_choices(engine: Engine, choices: list[str], context_tokens: int) -> None:
    """400 unless every spelling of every choice has tokens, and few enough to follow the context."""
    most = min(MAX_CHOICE_TOKENS, engine.max_model_len - context_tokens)
    for choice in find_choices(engine.tokenizer, choices):
        lengths = [len(variant) for variant in choice.variants]
        if min(lengths) == 0:
            raise bad_request(f"The choice {choice.text!r} has no tokens in this model; give another.", param="choices")
        if max(lengths) > most:
            raise bad_request(
                f"The choice {reprlib.repr(choice.text)} has {max(lengths)} tokens; after this prompt a choice may "
                f"have at most {most}.",
                param="choices",
            )
