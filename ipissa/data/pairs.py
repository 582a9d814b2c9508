"""Contrastive pairs: the same unfinished answer, in a chat with one persona and with the other.

Because the last tokens are the same on both sides, what differs between their hidden states is what
the model means to say next, not what it has said.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation
from ipissa.data.personas import Trait
from ipissa.data.prompts import spread
from ipissa.errors import ConfigError

MIN_OPENING = 2  # tokens


@dataclass(frozen=True)
class Opening:
    """The beginning of an answer to a prompt, which either persona could have written."""

    prompt: str
    tokens: list[int]


@dataclass(frozen=True)
class ContrastivePair:
    """Contexts under the two personas, and the opening that follows either."""

    prompt: str
    chosen: list[int]  # token ids
    rejected: list[int]
    opening: list[int]


def contrastive_pairs(tokenizer: Any, trait: Trait, openings: Sequence[Opening]) -> list[ContrastivePair]:
    """One pair per opening: only the persona words differ."""
    contexts = {
        (prompt, pole): chat_ids(tokenizer, trait.messages(prompt, pole))
        for prompt in dict.fromkeys(opening.prompt for opening in openings)
        for pole in (1, -1)
    }
    return [
        ContrastivePair(opening.prompt, contexts[opening.prompt, 1], contexts[opening.prompt, -1], opening.tokens)
        for opening in openings
    ]


def spread_pairs(pairs: Sequence[ContrastivePair], most: int) -> list[ContrastivePair]:
    """All pairs of so many prompts, at even distances, that they are about `most`.

    Prompts are kept whole, as those of sampled answers have pairs of both poles' answers in turn.
    """
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    kept = set(spread(prompts, max(1, most * len(prompts) // max(len(pairs), 1))))
    return [pair for pair in pairs if pair.prompt in kept]


def openings_from_continuations(continuations: Sequence[Continuation], *, seed: int) -> list[Opening]:
    """Every sampled answer, cut at a random token so that it is unfinished."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    cut = [(c.prompt, c.tokens[: rng.randint(MIN_OPENING, max(MIN_OPENING, len(c.tokens) - 1))]) for c in continuations]
    return [Opening(prompt, tokens) for prompt, tokens in cut]


def read_suffixes(path: str | Path) -> list[str]:
    """Unfinished answers from a text file with one per line, or a JSON list.

    Raises:
        ConfigError: the file cannot be read or holds no text.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        lines = json.loads(text) if path.suffix == ".json" else text.splitlines()
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ValueError("not a list of texts")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The suffixes file {path} cannot be read ({error}); give UTF-8 text with one per line, or a JSON list."
        ) from error
    suffixes = [line for line in lines if line.strip()]
    if not suffixes:
        raise ConfigError(f"The suffixes file {path} holds no text; write the beginning of an answer on each line.")
    return suffixes


def openings_from_suffixes(
    tokenizer: Any, suffixes: Sequence[str], prompts: Sequence[str], *, seed: int
) -> list[Opening]:
    """A user's own unfinished answers, each put to some prompt."""
    rng = random.Random(seed)  # noqa: S311
    return [
        Opening(rng.choice(list(prompts)), tokenizer.encode(suffix, add_special_tokens=False)) for suffix in suffixes
    ]
