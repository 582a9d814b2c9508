"""The page's view of the server: OpenAI's client for generation, one small request for each other thing."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import openai

from .tokens import Answer
from .view import Steer

Message = dict[str, str]
UNREACHABLE = "The server does not answer. Is it still running?"
REQUEST_SECONDS = 300.0
HEALTH_SECONDS = 5.0


class ServerError(Exception):
    """The server is gone, loading, busy, or refuses; the text says which, for a person."""

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Score:
    """The choices at one setting: the α that were applied, which the server may have rounded.

    A figure that is no number, as the odds of a choice without any probability, is None. `files` are the digests of
    the adapters that were asked for, by name.
    """

    steer: Steer
    logprobs: dict[str, float | None]
    log_odds: float | None
    choice_mass: float | None
    files: dict[str, str] = field(default_factory=dict)


class Client:
    """Talks to one ipissa server over HTTP; one connection pool for all users of a page.

    Args:
        base_url: Where this process finds the server.
        has_page: The server shows the page itself, so that browsers find it where they found the page.
    """

    def __init__(self, base_url: str, *, has_page: bool = False) -> None:
        self.url, self.has_page = base_url.rstrip("/"), has_page
        # The server is this machine's; a proxy from the environment could not reach it.
        http = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=REQUEST_SECONDS)
        self._openai = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http)

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()

    async def health(self) -> ServerError | None:
        """None when ready, else what is wrong: 503 as `/health` says, 502 when nobody answers, 504 when not in time."""
        try:
            options: Any = {"timeout": HEALTH_SECONDS}
            await _told(self._openai.get(f"{self.url}/health", cast_to=object, options=options), HEALTH_SECONDS)
        except ServerError as error:
            return error
        return None

    async def adapters(self, key: str) -> list[dict[str, Any]]:
        """The adapters the server has loaded."""
        return (await self._get("/v1/adapters", key))["data"]

    async def training_run(self, key: str, adapter: str) -> dict[str, Any]:
        """What an adapter's training recorded."""
        return await self._get(f"/v1/adapters/{quote(adapter, safe='')}/run", key)

    async def score(
        self, key: str, question: str, prefix: str, choices: Sequence[str], settings: Sequence[Steer]
    ) -> list[Score]:
        """The choices after the prefix, at every setting, in one request."""
        body = {
            "messages": [{"role": "user", "content": question}],
            "prefix": prefix,
            "choices": list(choices),
            "steer_alpha": list(settings),
        }
        answer = await self._post("/v1/score", key, body)
        return [
            Score(each["steer"], each["logprobs"], each["log_odds"], each["choice_mass"], answer["steer_adapters"])
            for each in answer["data"]
        ]

    async def tokenize(self, key: str, **what: Any) -> list[int]:
        """Token ids of `prompt` or of `messages`."""
        return (await self._post("/tokenize", key, what))["tokens"]

    async def read(
        self, key: str, texts: Sequence[Sequence[int]], settings: Sequence[Steer]
    ) -> tuple[list[list[list[tuple[str, float | None]]]], list[Steer]]:
        """(text, log-probability) of every token of every text, under every setting, and the settings as applied."""
        body = {
            "prompt": [list(ids) for ids in texts],
            "steer_alpha": list(settings),
            "echo": True,
            "max_tokens": 0,
            "logprobs": 0,
        }
        choices = (await self._post("/v1/completions", key, body))["choices"]
        rows = [
            list(zip(choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"], strict=True))
            for choice in choices
        ]
        applied = [choice["steer"] for choice in choices[: len(settings)]]
        return [rows[i : i + len(settings)] for i in range(0, len(rows), len(settings))], applied

    async def chat(
        self,
        key: str,
        messages: Sequence[Message],
        settings: Sequence[Steer],
        *,
        model: str,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> AsyncGenerator[list[Answer], None]:
        """The answers at every setting so far, growing token by token, all from the same sampling noise."""
        stream = await _told(
            self._openai.chat.completions.create(
                model=model,
                messages=list(messages),  # type: ignore[arg-type]
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                stream=True,
                logprobs=True,
                extra_headers=_bearer(key),
                extra_body={"steer_alpha": list(settings), "return_token_ids": True},
            )
        )
        answers = [Answer()] * len(settings)
        try:
            async for chunk in stream:
                for choice in chunk.choices:
                    answers[choice.index] = _grown(answers[choice.index], choice)
                yield list(answers)
        except openai.APIError as error:
            raise ServerError(error.message) from error
        finally:
            await stream.close()  # hangs up, which frees the engine

    async def _get(self, path: str, key: str) -> Any:
        options: Any = {"headers": _bearer(key)}
        return await _told(self._openai.get(self.url + path, cast_to=object, options=options))

    async def _post(self, path: str, key: str, body: Any) -> Any:
        options: Any = {"headers": _bearer(key)}
        return await _told(self._openai.post(self.url + path, body=body, cast_to=object, options=options))


def _grown(answer: Answer, choice: Any) -> Answer:
    """The answer with what a chunk adds; the text of several tokens belongs to the last of them."""
    logprobs = choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
    extra = choice.model_extra or {}
    ids = extra.get("token_ids", [])
    answer = replace(answer, steer=extra.get("steer", answer.steer))
    for left, token_id, token in zip(range(len(ids) - 1, -1, -1), ids, logprobs, strict=True):
        text = "" if left else choice.delta.content or ""
        answer = answer.add(text, token_id, token.logprob, last=not left and choice.finish_reason is not None)
    return answer


def _bearer(key: str) -> dict[str, str]:
    key = key.strip()  # as the server does with its own
    if not (key.isascii() and key.isprintable()):  # which a header cannot carry
        raise ServerError("The API key is missing or wrong; it holds characters that no key has.", 401)
    return {"Authorization": f"Bearer {key or 'none'}"}


async def _told(call: Any, seconds: float = REQUEST_SECONDS) -> Any:
    """The answer, or a `ServerError` that says in words what is wrong."""
    try:
        return await call
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        message = str(body.get("message") or error.message)
        if error.status_code == 429:
            message = f"The server is busy. {message}"
        if body.get("code") == "adapter_not_found":
            message += " It was unloaded; load this page again to see what there is."
        raise ServerError(message, error.status_code, body.get("code")) from error
    except openai.APITimeoutError as error:
        raise ServerError(f"The server did not answer within {seconds:.0f} seconds.", 504) from error
    except openai.APIConnectionError as error:
        raise ServerError(UNREACHABLE, 502) from error
