"""From settings to an objective: one by name, or a weighted sum of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any

from ipissa.adapter.config import one_of
from ipissa.errors import ConfigError
from ipissa.plain import typed
from ipissa.train.objectives.antiparallel import AntiparallelConfig
from ipissa.train.objectives.base import Objective, WeightedSum
from ipissa.train.objectives.contrastive import ContrastiveConfig
from ipissa.train.objectives.distill import KINDS

OBJECTIVES = (*KINDS, "contrastive", "antiparallel")


def objective_weights(text: str) -> dict[str, float]:
    """`guided` or `guided=1,contrastive=0.1` as weights by name.

    Raises:
        ConfigError: a name is unknown or a weight is not a positive number.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        one_of(name, dict.fromkeys(OBJECTIVES), name="objective")
        if name in weights:
            raise ConfigError(f"objective {text!r} names {name} twice; give it one weight.")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ConfigError(f"objective {part.strip()!r} has no positive weight; write {name}=0.5.")
    return weights


def build_objective(weights: Mapping[str, float], makers: Mapping[str, Callable[[], Objective]]) -> Objective:
    """The objective, or the weighted sum of several; only those that are wanted are made."""
    if list(weights.values()) == [1.0]:
        return makers[next(iter(weights))]()
    return WeightedSum({name: (weight, makers[name]()) for name, weight in weights.items()})


def says_which_pole(objectives: Collection[str]) -> bool:
    """Whether one of them teaches texts: losses on hidden states alone may learn the mirror image."""
    return not set(KINDS).isdisjoint(objectives)


def compares_states(objectives: Collection[str]) -> bool:
    """Whether one of them is of pairs, whose hidden states it compares."""
    return not set(objectives) <= set(KINDS)


def contrastive_config(values: Mapping[str, Any], *, beside: Collection[str] = ()) -> ContrastiveConfig:
    """`ContrastiveConfig` from plain values, for a sum with the objectives `beside` it.

    Distillation says which pole is which. Free to choose, the contrastive part could choose otherwise and fight it.
    """
    decided = {"flip": "none"} if says_which_pole(beside) else {}
    return _from_plain(ContrastiveConfig, decided | dict(values), "contrastive")


def antiparallel_config(values: Mapping[str, Any], *, beside: Collection[str] = ()) -> AntiparallelConfig:
    """`AntiparallelConfig` from plain values, for a sum with the objectives `beside` it, as `contrastive_config`."""
    decided = {"either_way": False} if says_which_pole(beside) else {}
    return _from_plain(AntiparallelConfig, decided | dict(values), "antiparallel")


def _from_plain(cls: Any, values: Mapping[str, Any], name: str) -> Any:
    known = {f.name: f.type for f in fields(cls)}
    for key in values:
        one_of(key, known, name=f"{name} setting")
    return cls(**{key: typed(f"{name} setting {key}", value, known[key]) for key, value in values.items()})
