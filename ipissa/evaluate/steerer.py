"""One way to steer with one interface: α turns a dial, or chooses who the model is told to be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ipissa.data.chat import chat_ids
from ipissa.data.personas import Messages, Trait
from ipissa.evaluate.dial import Dial

TOLD_ALPHAS = (-1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Steerer:
    """What is measured.

    Args:
        dial: Turned to α, unless the model is told.
        told: Steers by prompt instead: at α = ±1 the model is told to be that pole's persona, at 0 nothing,
            so that all ways to steer are the same model at 0. There is nothing in between.
    """

    dial: Dial
    told: Trait | None = None

    def supports(self, alphas: Iterable[float]) -> list[float]:
        """Those of `alphas` that this way to steer has."""
        return [alpha for alpha in alphas if self.told is None or alpha in TOLD_ALPHAS]

    def messages(self, text: str, alpha: float) -> Messages:
        """The chat that asks `text` at α."""
        if self.told is None or alpha == 0:
            return [{"role": "user", "content": text}]
        return self.told.messages(text, 1 if alpha > 0 else -1)

    def contexts(self, tokenizer: Any, texts: Sequence[str], alpha: float, prefill: str = "") -> list[list[int]]:
        """Token ids of the chats up to where the model goes on."""
        return [chat_ids(tokenizer, self.messages(text, alpha), prefill) for text in texts]

    def turned(self, alpha: float) -> float:
        """How far the dial turns at α."""
        return alpha if self.told is None else 0.0
