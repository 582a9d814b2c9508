"""How far a dial between two personas can reach, before one is trained.

Write T_s = log p(· | P_s) - log p(· | P_0) for what persona s changes in the model's predictions, against
the neutral persona. A dial whose effect is nearly odd in α changes them by +g at α = 1 and by -g at -1. It
follows both personas only as far as T_+ and -T_- agree: what both personas change in the same way (both
talk like somebody with a strong character) it cannot reach. To second order in T, where KL divergences
are squared lengths, KL(P_s || P_0) = |T_s|²/2 and KL(P_+ || P_-) = |T_+ - T_-|²/2, and the g that recovers
the same part of either persona's effect lies on the line from T_+ to -T_-. That part is

    reach = 1 - |T_+ + T_-|² / (|T_+| + |T_-|)²

1 for opposite personas of equal strength, 1/2 for unrelated ones of equal strength, 0 for equal ones. It
estimates what an odd dial can have as its smaller trait gain (`ipissa.evaluate.yardsticks`). It is no bound: a
rotation also has a part that is even in α, and adapters whose words reach 0.23 have recovered 0.68 at both poles.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ipissa.data.continuations import Continuation
from ipissa.data.personas import Trait
from ipissa.errors import TrainingError
from ipissa.train.told import told_logprobs

logger = logging.getLogger(__name__)
BATCH = 16
MIN_REACH = 0.2
MIN_STRENGTH = 0.002  # nats per token that a persona must move the prediction of its own texts


@dataclass(frozen=True)
class Reach:
    """Divergences between personas in nats per token, each on texts written under the first of the two."""

    positive: float  # KL(P_+ || P_0)
    negative: float  # KL(P_- || P_0)
    apart: float  # mean of KL(P_+ || P_-) and KL(P_- || P_+)

    @property
    def odd(self) -> float:
        """The part of either persona's effect that a dial odd in α can recover; see the module."""
        shared = 4 * (self.positive + self.negative) - 2 * self.apart  # |T_+ + T_-|²
        lengths = (2 * self.positive) ** 0.5 + (2 * self.negative) ** 0.5
        return 1 - shared / lengths**2 if lengths > 0 else 0.0

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return {"positive": self.positive, "negative": self.negative, "apart": self.apart, "odd": self.odd}


@torch.no_grad()
def measure_reach(model: Any, tokenizer: Any, trait: Trait, continuations: Sequence[Continuation]) -> Reach:
    """Read sampled texts of both poles under all three personas; `model` is the base model."""
    to_neutral, to_opposite = ({1: 0.0, -1: 0.0} for _ in range(2))
    tokens = {1: 0, -1: 0}
    if {c.pole for c in continuations} != {1, -1}:
        raise TrainingError("No prompt has a text of both poles that is not empty; give more prompts, or others.")
    ordered = sorted(continuations, key=lambda c: (c.pole, len(c.tokens)))
    for start in tqdm(range(0, len(ordered), BATCH), desc="reach", unit="batch"):
        batch = ordered[start : start + BATCH]
        own, neutral, opposite = (
            told_logprobs(model, tokenizer, trait, batch, [sign * c.pole for c in batch]) for sign in (1, 0, -1)
        )
        for i, c in enumerate(batch):
            n = len(c.tokens)
            tokens[c.pole] += n
            to_neutral[c.pole] += _divergence(own[i, :n], neutral[i, :n])
            to_opposite[c.pole] += _divergence(own[i, :n], opposite[i, :n])
    return Reach(
        positive=to_neutral[1] / tokens[1],
        negative=to_neutral[-1] / tokens[-1],
        apart=sum(to_opposite[pole] / tokens[pole] for pole in (1, -1)) / 2,
    )


def check_reach(reach: Reach, trait: Trait) -> None:
    """Before hours of training: warn if both personas change the text in mostly the same way.

    Raises:
        TrainingError: a persona changes nothing, so there is nothing to learn.
    """
    for pole, strength in ((1, reach.positive), (-1, reach.negative)):
        if not strength >= MIN_STRENGTH:  # nor if it is no number
            raise TrainingError(
                f"Told to be {trait.persona(pole)} person, this model says nearly what it says untold "
                f"({strength:.4f} nats per token); choose stronger words, other --prompts or a larger model."
            )
    if reach.odd < MIN_REACH:
        logger.warning(
            "%r and %r change this model's text mostly in the same way: the forecast for a dial between them is low, "
            "%.0f %% of what either persona does. Words with opposite effects reach further; compare some with "
            "`ipissa words`.",
            trait.positive,
            trait.negative,
            100 * max(reach.odd, 0),
        )


def _divergence(p: Tensor, q: Tensor) -> float:
    """Σ_t KL(p_t || q_t) of log-probabilities (tokens, vocab)."""
    return float((p.exp() * (p - q)).sum())
