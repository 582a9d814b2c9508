"""Settings from plain values, as YAML, JSON and command lines hold them."""

from __future__ import annotations

from typing import Any

from ipissa.errors import ConfigError


def typed(name: str, value: Any, annotation: Any) -> Any:
    """`value` as the type of a dataclass field; YAML reads 1e-3 as text and has no tuples.

    A tuple may be given as a list, or as the one thing that would be in it: `up_proj` for `[up_proj]`.

    Raises:
        ConfigError: it cannot be of that type.
    """
    if value is None and "None" in annotation:
        return None
    kind = annotation.removesuffix(" | None")
    if (
        kind == "str" and value is not None and not isinstance(value, str)
    ):  # YAML reads `no` as False, `2026` as a number
        raise ConfigError(f"{name} {value!r} is not text; put it in quotes.")
    try:
        if value is None:
            raise ValueError
        if kind.startswith("tuple"):
            item = float if "float" in kind else str
            return tuple(item(each) for each in (value if isinstance(value, (list, tuple)) else [value]))
        if kind.startswith("dict"):
            return dict(value)
        if kind == "bool" and not isinstance(value, bool):
            raise ValueError
        if kind == "int" and (isinstance(value, bool) or float(value) != int(value)):
            raise ValueError
        return {"str": str, "int": int, "float": float, "bool": bool}[kind](value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} {value!r} is not of type {kind}.") from None
