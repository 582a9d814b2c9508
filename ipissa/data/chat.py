"""Turn chat messages into the token ids a model continues."""

from __future__ import annotations

from functools import partial
from typing import Any

import jinja2

from ipissa.data.personas import Messages


def chat_ids(tokenizer: Any, messages: Messages, prefill: str = "") -> list[int]:
    """Token ids of the chat up to where the assistant speaks, or after `prefill` if it has begun to.

    Models without a chat template get a plain transcript; chat templates that know no system role
    get the system text at the head of the first user turn. Models that can think first are asked to answer at once:
    what they think of a persona is not how the persona speaks.
    """
    return tokenizer.encode(chat_text(tokenizer, messages) + prefill, add_special_tokens=False)


def chat_text(tokenizer: Any, messages: Messages) -> str:
    """The text form of `chat_ids`, special tokens included."""
    if tokenizer.chat_template is None:
        turns = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
        return (tokenizer.bos_token or "") + "".join(turns) + "Assistant:"
    template = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    try:
        return template(messages)
    except jinja2.TemplateError:
        if [message["role"] for message in messages[:2]] != ["system", "user"]:
            raise
        system, user, *rest = messages
        merged = {"role": user["role"], "content": f"{system['content']}\n\n{user['content']}"}
        return template([merged, *rest])
