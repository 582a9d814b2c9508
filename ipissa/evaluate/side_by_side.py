"""What the model writes when it is told who to be, beside what it writes when it is steered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ipissa.data.chat import chat_ids
from ipissa.data.continuations import generate_ids
from ipissa.data.personas import Trait
from ipissa.evaluate.dial import Dial

POLES = (1, 0, -1)
TOKENS = 40


def side_by_side(dial: Dial, tokenizer: Any, trait: Trait, prompts: Sequence[str]) -> str:
    """Greedy answers to every prompt at both poles and in the middle, told and steered, in Markdown.

    Told in the middle is told to be nobody in particular; steered in the middle is the base model.
    """
    lines = ["## Told and steered (greedy)"]
    for prompt in prompts:
        contexts = [chat_ids(tokenizer, trait.messages(prompt, pole)) for pole in POLES]
        plain = chat_ids(tokenizer, trait.messages(prompt, None))
        with dial.alpha([0.0] * len(POLES) + [float(pole) for pole in POLES]):
            answers = generate_ids(
                dial.model, tokenizer, contexts + [plain] * len(POLES), max_new_tokens=TOKENS, do_sample=False
            )
        texts = [cell(text) for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
        lines += ["", f"**{prompt}**", "", "| | told | steered |", "|-|-|-|"]
        for i, pole in enumerate(POLES):
            lines.append(f"| {trait.persona(pole)} person, α = {pole:+d} | {texts[i]} | {texts[i + len(POLES)]} |")
    return "\n".join(lines)


def cell(text: str) -> str:
    """A text as it can stand in a Markdown table."""
    return text.strip().replace("\n", " ").replace("|", "\\|")
