"""What tests of the page have in common: an adapter as the server tells of it, answers, links."""

from __future__ import annotations

import base64
import zlib

from ipissa_ui.tokens import Answer


def packed(text: str) -> str:
    return base64.urlsafe_b64encode(zlib.compress(text.encode())).decode()


def about(low: float, high: float, limit: float = 10.0) -> dict:
    trait = {"negative": "a bad", "positive": "a good"}
    return {"id": "good", "parent": "base", "alpha_range": [low, high], "max_alpha": limit, "trait": trait}


def grown(*tokens: tuple[str, int, float]) -> Answer:
    answer = Answer()
    for i, (text, token_id, logprob) in enumerate(tokens):
        answer = answer.add(text, token_id, logprob, last=i == len(tokens) - 1)
    return answer
