"""From a request's `model` and `steer_alpha` to the α of every adapter.

This is the only place that decides how a request is steered; everything after it carries a plain
mapping from adapter names to bucketed α.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ipissa.adapter import AnyAdapter
from ipissa.buckets import to_bucket

from .engine.base import Steer
from .errors import bad_request, not_found
from .schemas import SteerAlpha
from .settings import Settings


@dataclass(frozen=True)
class SteerSpec:
    """How a request is steered: one setting, or several for a sweep, in the order they were given."""

    settings: list[Steer]
    digests: dict[str, str]  # sha256 of the file of every adapter named


def resolve_steer(
    model: str | None, steer_alpha: SteerAlpha, adapters: dict[str, AnyAdapter], settings: Settings
) -> SteerSpec:
    """The `SteerSpec` of a request.

    Raises:
        ApiError: 404 for an unknown model or adapter, 400 for an α out of range or without an adapter.
    """
    selected = _selected_adapter(model, adapters, settings)
    sweep = steer_alpha if isinstance(steer_alpha, list) else [steer_alpha]
    steers = [_one_setting(value, selected, adapters, settings) for value in sweep]
    names = sorted({name for steer in steers for name in steer})
    return SteerSpec(steers, {name: adapters[name].digest or "" for name in names})


def check_model(model: str | None, adapters: Collection[str], settings: Settings) -> None:
    """404 unless `model` is the base model, an adapter, or absent."""
    if model is not None and model != settings.model and model not in adapters:
        known = ", ".join([settings.model, *adapters])
        raise not_found(
            f"The model {reprlib.repr(model)} does not exist; use one of {known}.",
            param="model",
            code="model_not_found",
        )


def _selected_adapter(model: str | None, adapters: dict[str, AnyAdapter], settings: Settings) -> str | None:
    """The adapter a plain number is for: the one named as the model, or the only one."""
    check_model(model, adapters, settings)
    if model in adapters:
        return model
    return next(iter(adapters)) if len(adapters) == 1 else None


def _one_setting(
    value: float | dict[str, float] | None, selected: str | None, adapters: dict[str, AnyAdapter], settings: Settings
) -> Steer:
    if value is None and (selected is None) and (settings.default_alpha == 0 or not adapters):
        return {}
    if value is None:
        value = settings.default_alpha
    if isinstance(value, dict):
        _check_names(value, adapters)
        return {name: bucketed(alpha, settings) for name, alpha in value.items()}
    if selected is None:
        known = ", ".join(adapters) or "none"
        raise bad_request(
            f"steer_alpha {value} does not say which adapter it is for; name one as the model, "
            f'or give an object such as {{"name": {value}}}. Loaded adapters: {known}.',
            param="steer_alpha",
        )
    return {selected: bucketed(value, settings)}


def _check_names(names: Iterable[str], adapters: dict[str, AnyAdapter]) -> None:
    for name in names:
        if name not in adapters:
            known = ", ".join(adapters) or "none"
            raise not_found(
                f"The adapter {reprlib.repr(name)} does not exist; loaded adapters: {known}.",
                param="steer_alpha",
                code="adapter_not_found",
            )


def bucketed(alpha: float, settings: Settings) -> float:
    """α rounded to the server's bucket and within its range, or a 400 that says the range."""
    limit = settings.max_alpha
    if not -limit <= alpha <= limit:
        raise bad_request(
            f"steer_alpha {alpha:g} is out of range; use a number from {-limit:g} to {limit:g}.", param="steer_alpha"
        )
    return to_bucket(alpha, settings.bucket, limit=limit)
