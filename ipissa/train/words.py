"""Compare words before training: how strong is what each persona does, and how opposite?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ipissa.data.continuations import Sampling, sample_continuations
from ipissa.data.personas import Trait
from ipissa.errors import ConfigError
from ipissa.train.reach import Reach, measure_reach

HEADER = "| positive / negative | reach | effect + | effect - |\n|-|-|-|-|"


@dataclass(frozen=True)
class Words:
    """A pair of words and what a dial between them could do."""

    positive: str
    negative: str
    reach: Reach

    def row(self) -> str:
        """As a row under `HEADER`; effects in nats per token."""
        r = self.reach
        return f"| {self.positive} / {self.negative} | {r.odd:.2f} | {r.positive:.3f} | {r.negative:.3f} |"


def split_pair(text: str) -> tuple[str, str]:
    """`kind, loving / angry, hateful` as its two sides.

    Raises:
        ConfigError: there are not two.
    """
    sides = [side.strip() for side in text.split("/")]
    if len(sides) != 2 or not all(sides):
        raise ConfigError(f"{text!r} is not a pair of words; write them with a slash between, as in 'kind / angry'.")
    return sides[0], sides[1]


def compare_words(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], prompts: Sequence[str], *, seed: int = 0
) -> Iterator[Words]:
    """Measure one pair after the other on one sampled answer per prompt and pole."""
    traits = [Trait.from_words(positive, negative) for positive, negative in pairs]
    for (positive, negative), trait in zip(pairs, traits, strict=True):
        texts = sample_continuations(model, tokenizer, trait, prompts, per_prompt=1, sampling=Sampling(), seed=seed)
        yield Words(positive, negative, measure_reach(model, tokenizer, trait, texts))
