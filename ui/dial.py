"""The dials: one per adapter, over its calibrated range, composed. Drawn by `page.js`, as one component."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gradio as gr

from .view import Steer

STEP = 0.05
START = 1.0
JS = "ipissa.listen(element, props, trigger)"  # triggers 'input' while a dial moves and 'release' after it


def dials(**props: Any) -> gr.HTML:
    """All dials at once. The value is `{"dials": [...], "alphas": {name: α}, "held": name, "moved": n}`.

    One component rather than a slider each, so that a position is never that of half the dials, and because
    a Gradio slider marks neither 0 nor a range. (Not a subclass: Gradio writes files beside those.)
    """
    return gr.HTML(empty(), html_template="${ipissa.drawDials(value)}", js_on_load=JS, apply_default_css=False, **props)


def empty() -> dict[str, Any]:
    """The value while no adapter is known."""
    return {"dials": [], "alphas": {}, "held": "", "moved": 0}


def dials_of(adapters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a dial shows of each adapter: its range in whole steps with 0 in it, its limit, and its poles."""
    return [_dial(about) for about in adapters]


def _dial(about: dict[str, Any]) -> dict[str, Any]:
    limit = about["max_alpha"]
    low, high = (max(-limit, min(limit, end)) for end in about["alpha_range"])
    return {
        "name": about["id"],
        "low": round(math.ceil(min(low, 0.0) / STEP - 1e-9) * STEP, 2) + 0.0,
        "high": round(math.floor(max(high, 0.0) / STEP + 1e-9) * STEP, 2) + 0.0,
        "limit": limit,
        "step": STEP,
        "negative": f"{about['trait']['negative']} person",
        "positive": f"{about['trait']['positive']} person",
    }


def dial_value(dials: list[dict[str, Any]], alphas: Mapping[str, float], held: str) -> dict[str, Any]:
    """The component's value with every dial at its α, kept within what the server takes; the others at 0."""
    positions = {each["name"]: max(-each["limit"], min(each["limit"], alphas.get(each["name"], 0.0))) for each in dials}
    held = held if held in positions else next(iter(positions), "")
    return {"dials": dials, "alphas": positions, "held": held, "moved": 0}


def start(dials: list[dict[str, Any]]) -> Steer:
    """Where a fresh page begins: the first dial at +1, or as near as its range allows."""
    return {dials[0]["name"]: min(START, dials[0]["high"])} if dials else {}
