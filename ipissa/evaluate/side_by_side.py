"""What the model writes when it is told who to be, beside what it writes when it is steered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ipissa.data.chat import chat_ids
from ipissa.data.continuations import generate_ids
from ipissa.data.personas import Trait
from ipissa.evaluate.dial import Dial

POLES = (1, 0, -1)
TOKENS = 40


@dataclass(frozen=True)
class ToldAndSteered:
    """Two greedy answers to one prompt.

    Args:
        prompt: What was asked.
        persona: Whom the model was told to be, without an α.
        told: What it wrote then.
        alpha: What it was steered to, told nothing.
        steered: What it wrote then.
    """

    prompt: str
    persona: str
    told: str
    alpha: float
    steered: str

    @property
    def setting(self) -> str:
        """Who it was and where the dial stood."""
        return f"{self.persona}, α = {f'{self.alpha:+g}' if self.alpha else '0'}"


def side_by_side(dial: Dial, tokenizer: Any, trait: Trait, prompts: Sequence[str]) -> list[ToldAndSteered]:
    """Greedy answers to every prompt at both poles and in the middle, told and steered.

    Told in the middle is told to be nobody in particular; steered in the middle is the base model.
    """
    found = []
    for prompt in prompts:
        contexts = [chat_ids(tokenizer, trait.messages(prompt, pole)) for pole in POLES]
        plain = chat_ids(tokenizer, trait.messages(prompt, None))
        with dial.alpha([0.0] * len(POLES) + [float(pole) for pole in POLES]):
            answers = generate_ids(
                dial.model, tokenizer, contexts + [plain] * len(POLES), max_new_tokens=TOKENS, do_sample=False
            )
        texts = [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
        told, steered = texts[: len(POLES)], texts[len(POLES) :]
        found += [
            ToldAndSteered(prompt, f"{trait.persona(pole)} person", told[i], float(pole), steered[i])
            for i, pole in enumerate(POLES)
        ]
    return found


def by_prompt(answers: Sequence[ToldAndSteered]) -> dict[str, list[ToldAndSteered]]:
    """The answers to every prompt."""
    return {prompt: list(of) for prompt, of in groupby(answers, key=lambda each: each.prompt)}


def texts_markdown(answers: Sequence[ToldAndSteered]) -> str:
    """A table per prompt."""
    lines = ["## Told and steered (greedy)"]
    for prompt, of in by_prompt(answers).items():
        lines += ["", f"**{prompt}**", "", "| | told | steered |", "|-|-|-|"]
        lines += [f"| {each.setting} | {cell(each.told)} | {cell(each.steered)} |" for each in of]
    return "\n".join(lines)


def cell(text: str) -> str:
    """A text as it can stand in a Markdown table."""
    return text.strip().replace("\n", " ").replace("|", "\\|")
