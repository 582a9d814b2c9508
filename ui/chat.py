"""A conversation in which α may change between turns; every answer says which α spoke."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from .client import Message
from .tokens import Answer
from .view import Steer, describe


@dataclass(frozen=True)
class Turn:
    """What the user said, and what was answered at which setting."""

    said: str
    steer: Steer
    answered: str = ""
    note: str = ""  # why the answer is not whole


@dataclass
class Conversation:
    """The turns so far; changed in place, as what is said next may be on its way before an answer has ended."""

    turns: list[Turn] = field(default_factory=list)


def messages_of(turns: list[Turn]) -> list[Message]:
    """The conversation as the server takes it, up to where the assistant speaks; without what was left unanswered."""
    *before, now = turns
    messages = []
    for turn in [each for each in before if each.answered]:
        messages.append({"role": "user", "content": turn.said})
        messages.append({"role": "assistant", "content": turn.answered})
    return [*messages, {"role": "user", "content": now.said}]


def transcript(turns: list[Turn]) -> list[dict[str, Any]]:
    """The conversation as Gradio's chatbot shows it, with the setting above every answer.

    Escaped, since the chatbot takes every text for HTML, and would fetch what a model names.
    """
    shown: list[dict[str, Any]] = []
    for turn in turns:
        note = f"\n\n⚠️ {turn.note}" if turn.note else ""
        content = f"α = {describe(turn.steer)}\n\n{turn.answered or '…'}{note}"
        shown += [{"role": "user", "content": _plain(turn.said)}, {"role": "assistant", "content": _plain(content)}]
    return shown


def _plain(text: str) -> str:
    return escape(text, quote=False)


def answered(turns: list[Turn], answer: Answer, note: str = "") -> list[Turn]:
    """The conversation with the last answer as it is now, at the α that were applied."""
    steer = answer.steer or turns[-1].steer
    return [*turns[:-1], replace(turns[-1], steer=steer, answered=answer.text, note=note)]
