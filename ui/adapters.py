"""An adapter's page: what it is, what was measured, its card, and the run that trained it."""

from __future__ import annotations

from typing import Any

import pandas as pd

YARDSTICKS = {"trait_gain": "trait gain", "plain_gain": "plain gain (nats per token)", "contrast": "contrast"}
NOT_FIGURES = {"step", "epoch", "learning_rate", "grad_norm", "total_flos"}


def describe_adapter(about: dict[str, Any]) -> str:
    """Markdown: facts, and the yardsticks with their intervals where the file has them."""
    low, high = about["alpha_range"]
    trait = about["trait"]
    facts = {
        "α = +1": f"{trait['positive']} person",
        "α = -1": f"{trait['negative']} person",
        "range of the dial": f"{low:+g} to {high:+g}, {_read_from(about['evaluation'])}",
        "the server takes": f"-{about['max_alpha']:g} to +{about['max_alpha']:g}",
        "base model": about["base_model"].get("name", about["parent"]),
        "adapted": _adapted(about["kind"], about["config"]),
        "licence": about["license"] or "not given",
        "sha256": f"`{about['digest']}`",
    }
    table = "\n".join(f"| {name} | {_cell(str(value))} |" for name, value in facts.items())
    return f"### {_cell(about['id'])}\n\n| | |\n|-|-|\n{table}\n\n{_yardsticks(about['evaluation'])}"


def _cell(text: str) -> str:
    """A text that stays within its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _read_from(evaluation: dict[str, Any] | None) -> str:
    if "calibration" in (evaluation or {}):
        return "where generated text was measured to hold together"
    return "not known to be read from text; `ipissa calibrate` reads it"


def _adapted(kind: str, config: dict[str, Any]) -> str:
    layers = f"{len(config['modules'])} layers"
    return f"{layers}, rank {config['rank']}" if "rank" in config else f"{layers}, by a {kind}"  # a vector has no rank


def _yardsticks(evaluation: dict[str, Any] | None) -> str:
    measured = (evaluation or {}).get("yardsticks")
    if not measured:
        return "Its file holds no evaluation."
    rows = [
        f"| {pole} | {' | '.join(_interval(measured[pole].get(name)) for name in YARDSTICKS)} |"
        for pole in ("positive", "negative")
        if pole in measured
    ]
    return (
        f"**Measured on {measured['prompts']} held-out prompts at α = ±{measured['alpha']:g}**, with 95 % intervals; "
        "trait gain 1 is as much as telling the model\n\n"
        f"| pole | {' | '.join(YARDSTICKS.values())} |\n|{'-|' * (len(YARDSTICKS) + 1)}\n" + "\n".join(rows)
    )


def _interval(figure: dict[str, float] | None) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" if figure else ""


def history_frame(run: dict[str, Any]) -> pd.DataFrame:
    """Every figure of a run over its steps, in long form: step, figure, value."""
    rows = [
        {"step": record["step"], "figure": name, "value": value}
        for record in run["history"]
        for name, value in record.items()
        if name not in NOT_FIGURES
        and isinstance(value, float)
        and (not name.startswith("eval_") or name == "eval_loss")
    ]
    return pd.DataFrame(rows, columns=["step", "figure", "value"])


def layers_frame(run: dict[str, Any]) -> pd.DataFrame:
    """What changed per layer, the largest change first."""
    frame = pd.DataFrame(run["layers"])
    return frame.sort_values("change", ascending=False).round(3) if "change" in frame else frame
