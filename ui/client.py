"""The page's view of the server: OpenAI's client for generation, one small request for each other thing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import openai

Message = dict[str, str]
UNREACHABLE = "The server does not answer. Is it still running?"
REQUEST_SECONDS = 120.0


class ServerError(Exception):
    """The server is gone, loading, busy, or refuses; the text says which, for a person."""


@dataclass(frozen=True)
class Score:
    """The choices at one α."""

    alpha: float
    logprobs: dict[str, float]
    log_odds: float
    choice_mass: float


class Client:
    """Talks to one ipissa server over HTTP."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        self._openai = openai.AsyncOpenAI(
            base_url=f"{base_url}/v1",
            api_key=api_key or "none",
            max_retries=0,
            # The server is this machine's; a proxy from the environment could not reach it.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False, timeout=REQUEST_SECONDS),
        )

    async def adapters(self) -> list[dict[str, Any]]:
        """The adapters the server has loaded."""
        return (await self._request(self._openai.get("/adapters", cast_to=object)))["data"]

    async def score(self, adapter: str, question: str, choices: list[str], alphas: list[float]) -> list[Score]:
        """Log-odds of the choices after "My choice:", at every α, in one request."""
        body = {
            "model": adapter,
            "messages": [{"role": "user", "content": question}],
            "choices": choices,
            "steer_alpha": alphas,
        }
        answer = await self._request(self._openai.post("/score", body=body, cast_to=object))
        return [
            Score(each["steer"][adapter], each["logprobs"], each["log_odds"], each["choice_mass"])
            for each in answer["data"]
        ]

    async def generate(
        self, adapter: str, prompt: str, alphas: list[float], *, max_tokens: int, temperature: float, seed: int
    ) -> AsyncIterator[list[str]]:
        """The answers at every α so far, growing token by token, all from the same sampling noise."""
        texts = [""] * len(alphas)
        stream = await self._request(
            self._openai.chat.completions.create(
                model=adapter,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                stream=True,
                extra_body={"steer_alpha": alphas},
            )
        )
        try:
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                yield list(texts)
        except openai.APIError as error:
            raise ServerError(error.message) from error
        finally:
            await stream.close()  # hangs up, which frees the engine

    async def _request(self, call: Any) -> Any:
        try:
            return await call
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            raise ServerError(str(body.get("message") or error.message)) from error
        except openai.APIConnectionError as error:
            raise ServerError(UNREACHABLE) from error
