"""Scores on vLLM: what every choice's log-probability is, from distributions over the next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.utils import random_uuid
from vllm.v1.engine.async_llm import AsyncLLM

from ipissa.evaluate.scoring import Choice

from .vllm_tokens import next_token_distribution

Text = tuple[int, ...]


async def choice_logprobs(
    llm: AsyncLLM, context: Sequence[int], choices: Sequence[Choice], lora: LoRARequest | None
) -> list[float]:
    """log P of every choice: the probabilities of its spellings add up, those of a spelling's tokens multiply."""
    found = {text: await _next_token(llm, text, tokens, lora) for text, tokens in _questions(context, choices).items()}

    def of(spelling: Text) -> float:
        return sum(found[(*context, *spelling[:i])][token] for i, token in enumerate(spelling))

    return [
        float(torch.tensor([of(each) for each in choice.variants], dtype=torch.float64).logsumexp(0))
        for choice in choices
    ]


def _questions(context: Sequence[int], choices: Sequence[Choice]) -> dict[Text, set[int]]:
    """Which tokens' log-probabilities are needed after which text; one text if every spelling is one token."""
    wanted: dict[Text, set[int]] = {}
    for choice in choices:
        for spelling in choice.variants:
            for i, token in enumerate(spelling):
                wanted.setdefault((*context, *spelling[:i]), set()).add(token)
    return wanted


async def _next_token(llm: AsyncLLM, text: Text, tokens: set[int], lora: LoRARequest | None) -> dict[int, float]:
    prompt = TokensPrompt(prompt_token_ids=list(text))
    async for output in llm.generate(prompt, next_token_distribution(), random_uuid(), lora_request=lora):
        if found := output.outputs[0].logprobs:
            pairs = zip(found.token_ids, found.logprobs, strict=True)
            return {token: value for token, value in pairs if token in tokens}
    raise RuntimeError("vLLM ended a score without an answer.")
