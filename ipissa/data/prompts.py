"""Prompts to train and to measure on: the list that ships with the project, or the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from ipissa.errors import ConfigError

T = TypeVar("T")
HELD_OUT_EVERY = 4
MIN_PROMPTS = 8


def load_prompts(path: str | Path | None = None) -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts) from a text file with one prompt per line.

    Every fourth prompt is held out, by position, so that the split is the same in every run; a prompt that stands
    there twice counts once, so that none is on both sides.
    """
    if path is None:
        prompts = _bundled("prompts.txt")
    else:
        try:
            prompts = _lines(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The prompts file {path} cannot be read ({error}); give a UTF-8 text file.") from error
    if len(prompts) < MIN_PROMPTS:
        raise ConfigError(f"{path} holds {len(prompts)} prompts; give at least {MIN_PROMPTS}, one per line.")
    held_out = prompts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [prompt for i, prompt in enumerate(prompts) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1], held_out


def load_evaluation_prompts(path: str | Path | None = None) -> tuple[list[str], list[str], list[str]]:
    """(training, tuning, held-out prompts) of an evaluation; a method may learn from the first and be tuned on both.

    The bundled held-out ones are a list of their own. The trainer's defaults were chosen on its held-out prompts, so
    these are for tuning here. Of a user's own file training prompts are for tuning, too.
    """
    training, held_out = load_prompts(path)
    if path is None:
        return training, held_out, _bundled("evaluation_prompts.txt")
    return training, training, held_out


def _bundled(name: str) -> list[str]:
    return _lines(files("ipissa.data").joinpath(name).read_text(encoding="utf-8"))


def _lines(text: str) -> list[str]:
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def prompts_digest(path: str | Path | None = None) -> str:
    """A short name that changes with any prompt of the list."""
    return digest_of([prompt for side in load_prompts(path) for prompt in side])


def digest_of(texts: Sequence[str]) -> str:
    """A short name that changes with any of the texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of them at even distances, so that every part of a list is seen."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
