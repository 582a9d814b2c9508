"""Request and response bodies: OpenAI's fields, plus `steer_alpha` and what it did."""

from __future__ import annotations

import json
import math
import reprlib
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_LOGPROBS = 20
UNSUPPORTED_FIELD = "unsupported_field"
NOT_AN_ALPHA = "not_an_alpha"  # the range to use instead is a setting, which no schema knows
USUAL_TOKENS = 16  # as OpenAI has it for completions
MAX_STOPS = 4
MAX_CHOICE_CHARACTERS = 1000
LARGEST_INTEGER = 10**300

# OpenAI fields that this server does not implement, with the values that ask for nothing.
# Anything else in them is refused: a field is never silently dropped.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None, "none"),
    "functions": (None, []),
    "include_obfuscation": (None, False),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# The same of messages, which clients send back as they got them.
UNSUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None, ""),
    "tool_call_id": (None, ""),
    "tool_calls": (None, []),
}


def _check_alpha(value: Any) -> Any:
    """A finite real number, and nothing that merely converts to one."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_INTEGER:
        value = math.inf  # beyond what a float holds
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PydanticCustomError(
            NOT_AN_ALPHA, "steer_alpha {value} is not a finite number", {"value": reprlib.repr(value)}
        )
    return float(value)


def _check_steer_alpha(value: Any) -> Any:
    if isinstance(value, list):
        if not value:
            raise ValueError("steer_alpha is an empty list; give at least one number.")
        return [_check_steer_setting(each) for each in value]
    return None if value is None else _check_steer_setting(value)


def _check_steer_setting(value: Any) -> Any:
    if isinstance(value, dict):
        if not value:
            raise ValueError('steer_alpha is an empty object; name an adapter, as in {"honest": 0.7}.')
        return {name: _check_alpha(alpha) for name, alpha in value.items()}
    return _check_alpha(value)


SteerSetting = float | dict[str, float]
SteerAlpha = SteerSetting | list[SteerSetting] | None
SteerAlphaField = Annotated[
    SteerAlpha,
    BeforeValidator(_check_steer_alpha),
    Field(
        description="How far to turn the dial: a number; an object of numbers by adapter name, to compose "
        "adapters; or a list of either, a sweep. Absent: the server's default."
    ),
]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda value: [] if value is None else [value] if isinstance(value, str) else value),
    Field(max_length=MAX_STOPS, description="Strings at which to stop; they are not part of the text."),
]


class RequestBody(BaseModel):
    """Base of requests: unknown fields are refused, unsupported ones unless they ask for nothing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = UNSUPPORTED

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        _check_text(data)
        for name, inert in cls.unsupported.items():
            if name in data and name not in cls.model_fields and not any(_same(data[name], each) for each in inert):
                raise PydanticCustomError(UNSUPPORTED_FIELD, "{field} is not supported; remove it.", {"field": name})
        return {key: value for key, value in data.items() if key not in cls.unsupported or key in cls.model_fields}


def _check_text(data: Any) -> None:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("The request holds half of a surrogate pair, which is not text; send valid Unicode.") from None
    except RecursionError:
        raise ValueError("The request is nested too deeply; no field needs more than a few levels.") from None


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


class SteeredRequest(RequestBody):
    """What completions, chat and score have in common."""

    model: str | None = Field(None, description="The base model, or an adapter, which selects it.")
    steer_alpha: SteerAlphaField = None
    user: str | None = Field(None, description="Accepted and unused, as it only labels the caller.")
    metadata: dict[str, str] | None = Field(None, description="Accepted and unused, as it only labels the request.")


class StreamOptions(RequestBody):
    include_usage: bool = False


class GenerationBody(SteeredRequest):
    """Sampling fields shared by completions and chat."""

    asked_in: ClassVar[str] = "prompt"  # the field that says what to answer

    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=0, description="Sample from the k likeliest tokens; 0 for all.")
    min_p: float | None = Field(
        0.0, ge=0, le=1, description="Leave out tokens less likely than this share of the likeliest."
    )
    n: int | None = Field(1, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stops = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Fixes the sampling noise, the same for every α.")
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    return_token_ids: bool | None = Field(False, description="Add token ids to choices, and those of the prompts.")

    @property
    def length(self) -> tuple[str, int | None]:
        """The field that says how long an answer may be, and how long that is; None for what fits."""
        raise NotImplementedError

    @model_validator(mode="after")
    def options_need_streaming(self) -> GenerationBody:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is only for stream: true.")
        return self


class CompletionRequest(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="Text or token ids, one or several.")
    max_tokens: int | None = Field(USUAL_TOKENS, ge=0)
    logprobs: Annotated[int | None, BeforeValidator(lambda value: None if value is False else value)] = Field(
        None, ge=0, le=MAX_LOGPROBS
    )
    echo: bool | None = Field(False, description="Begin with the prompt, and with its log-probabilities.")

    @model_validator(mode="after")
    def something_is_asked_for(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 is only for echo: true; give at least 1.")
        return self

    @property
    def length(self) -> tuple[str, int | None]:
        return "max_tokens", USUAL_TOKENS if self.max_tokens is None else self.max_tokens


class TextPart(RequestBody):
    type: Literal["text"]
    text: str


class ChatMessage(RequestBody):
    unsupported = UNSUPPORTED_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, description="Accepted and unused, as it only labels the speaker.")

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it; `developer` is what OpenAI now calls `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatRequest(GenerationBody):
    """POST /v1/chat/completions."""

    asked_in = "messages"

    messages: Messages
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def options_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs: true.")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one.")
        return self

    @property
    def length(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class ScoreBody(SteeredRequest):
    """POST /v1/score."""

    prompt: str | None = None
    messages: Messages | None = None
    prefix: str = Field("My choice:", description="What the answer has begun with.")
    choices: list[Annotated[str, Field(max_length=MAX_CHOICE_CHARACTERS)]] = Field(
        default_factory=lambda: ["Yes", "No"], min_length=2, max_length=64
    )

    @model_validator(mode="after")
    def one_prompt(self) -> ScoreBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("Give exactly one of prompt and messages.")
        return self


class TokenizeBody(RequestBody):
    """POST /tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def one_prompt(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("Give exactly one of prompt and messages.")
        return self


class DetokenizeBody(RequestBody):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class AddAdapterBody(RequestBody):
    """POST /v1/adapters."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    path: str = Field(description="A file below the server's --adapter-dir.")


# --- responses --------------------------------------------------------------------------------


class Usage(BaseModel):
    """Tokens read and written. Prompts count once, however many α or choices they are answered at."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ScoreEntry(BaseModel):
    """The choices at one α."""

    index: int
    steer: dict[str, float]
    logprobs: dict[str, float]
    log_odds: float
    choice_mass: float


class ScoreResponse(BaseModel):
    """Answer of POST /v1/score; `data` has one entry per α, in the order they were given."""

    id: str
    object: Literal["score"] = "score"
    created: int
    model: str
    choices: list[str]
    data: list[ScoreEntry]
    steer_adapters: dict[str, str]
    usage: Usage


def new_id(prefix: str) -> str:
    """A fresh response id."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
