"""The page's requests as they can be made without it: as curl, Python and JSON."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Callable
from typing import Any

from .view import View

ANSWERS, CHOICE = "the two answers", "the choice"
KEY = "$IPISSA_API_KEY"


def requests_of(view: View, model: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """(path, body) of what the page asks, by what it is for."""
    answers = {
        "model": model,
        "messages": [{"role": "user", "content": view.prompt}],
        "steer_alpha": [view.left, view.right],
        "max_tokens": view.max_tokens,
        "temperature": view.temperature,
        "seed": view.seed,
    }
    choice = {
        "model": model,
        "messages": [{"role": "user", "content": view.question}],
        "prefix": view.prefix,
        "choices": view.choice_list,
        "steer_alpha": [view.left],
    }
    return {ANSWERS: ("/v1/chat/completions", answers), CHOICE: ("/v1/score", choice)}


def as_curl(url: str, path: str, body: dict[str, Any], *, needs_key: bool) -> str:
    """A shell command."""
    key = f' \\\n  -H "Authorization: Bearer {KEY}"' if needs_key else ""
    return (
        f'curl -s {shlex.quote(url + path)} -H "Content-Type: application/json"{key} \\\n'
        f"  -d {shlex.quote(as_json(url, path, body, needs_key=needs_key))}"
    )


def as_python(url: str, path: str, body: dict[str, Any], *, needs_key: bool) -> str:
    """Lines for OpenAI's client."""
    key = 'os.environ["IPISSA_API_KEY"]' if needs_key else '"none"'
    head = "import os\n\nimport openai\n\n" if needs_key else "import openai\n\n"
    head += f'client = openai.OpenAI(base_url="{url}/v1", api_key={key})\n'
    if path == "/v1/score":
        return (
            f'{head}answer = client.post("/score", cast_to=object, body={body!r})\n'
            'for score in answer["data"]:\n    print(score["steer"], score["log_odds"], score["choice_mass"])'
        )
    usual = {name: value for name, value in body.items() if name != "steer_alpha"}
    arguments = "".join(f"    {name}={value!r},\n" for name, value in usual.items())
    extra = f'{{"steer_alpha": {body["steer_alpha"]!r}}}'
    return (
        f"{head}answer = client.chat.completions.create(\n{arguments}    extra_body={extra},\n)\n"
        "for choice in answer.choices:\n    print(choice.steer, choice.message.content)"
    )


def as_json(url: str, path: str, body: dict[str, Any], *, needs_key: bool) -> str:
    """The body of the request, one line per field."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in body.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


FORMS: dict[str, tuple[str, Callable[..., str]]] = {
    "curl": ("shell", as_curl),
    "Python": ("python", as_python),
    "JSON": ("json", as_json),
}


def snippet(view: View, what: str, form: str, url: str, model: str, *, needs_key: bool = False) -> str:
    """One of the page's requests in one of the forms."""
    path, body = requests_of(view, model)[what]
    return FORMS[form][1](url, path, body, needs_key=needs_key)


def as_file(name: str, kind: str, content: bytes) -> dict[str, str]:
    """A file for the browser to save."""
    return {"name": name, "data": f"data:{kind};base64,{base64.b64encode(content).decode()}"}
