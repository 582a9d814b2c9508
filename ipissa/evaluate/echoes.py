"""Held-out texts in which the told model says the persona line itself.

Now and then a small model repeats what it was told ("Pretend you're a kind person."). Such a text is so much likelier
told than untold that one of a hundred can carry a tenth of a trait gain, and to say the words of a prompt is no trait.
So trait gains are reported without these texts too, for every method alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ipissa.data.continuations import Continuation
from ipissa.data.personas import Trait
from ipissa.evaluate.yardsticks import Estimate, PoleYardsticks, bootstrap_ratio

Echoes = dict[str, list[str]]  # pole, "+" or "-": prompts
FEWEST = 2  # prompts that have an interval


def find_echoes(texts: Sequence[Continuation], tokenizer: Any, trait: Trait) -> Echoes:
    """Per pole the prompts with a text that holds a persona line of the trait, whosever; spaces and case aside."""
    lines = [_plain(trait.template.format(persona=trait.persona(pole))) for pole in (1, 0, -1)]
    found: dict[str, set[str]] = {"+": set(), "-": set()}
    for text in texts:
        said = _plain(tokenizer.decode(text.tokens, skip_special_tokens=True))
        if any(line in said for line in lines):
            found["+" if text.pole > 0 else "-"].add(text.prompt)
    return {pole: sorted(prompts) for pole, prompts in found.items()}


def trait_gain_without(pole: PoleYardsticks, prompts: Collection[str]) -> Estimate:
    """The trait gain of a pole over all prompts but these.

    Returns:
        NaN where fewer than two are left.

    Raises:
        ValueError: it was not kept what each prompt contributes.
    """
    if pole.by_prompt is None:
        raise ValueError("Prompts can be left out only where it was kept what each of them contributes.")
    left = np.array([prompt not in prompts for prompt in pole.by_prompt.prompts])
    if left.sum() < FEWEST:
        return Estimate(math.nan, math.nan, math.nan, math.nan)
    return bootstrap_ratio(np.array(pole.by_prompt.steered)[left], np.array(pole.by_prompt.told)[left], seed=0)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
