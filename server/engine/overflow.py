"""Numbers that outgrow their type: how scores tell, and what a request is told then."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ipissa.errors import ConfigError
from ipissa.evaluate.scoring import ChoiceScore

from .base import Steer


def check_scores(scores: Sequence[ChoiceScore], steers: Sequence[Steer], dtype: torch.dtype | str) -> None:
    """ConfigError for the first setting at which a log-probability is none. -inf is one, of what a model rules out."""
    for score, steer in zip(scores, steers, strict=True):
        if any(math.isnan(value) or value == math.inf for value in score.logprobs.values()):
            raise overflow(steer, dtype)


def overflow(steer: Steer, dtype: torch.dtype | str) -> ConfigError:
    """What is wrong, and what would help."""
    name, steered = str(dtype).removeprefix("torch."), any(steer.values())
    at = f"At steer_alpha {dict(steer)}" if steered else "Without steering"
    ways = ["an alpha nearer 0"] * steered + ["a server with --dtype float32"] * (name != "float32")
    remedy = f"use {', or '.join(ways)}" if ways else "the model's files may be damaged"
    return ConfigError(f"{at} the numbers of the model outgrow {name}; {remedy}.")
