"""Draw what a run recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ipissa.files import write_whole

HIDDEN = {"epoch", "step", "learning_rate", "grad_norm", "total_flos"}


def plot_history(history: Sequence[dict[str, float]], path: Path) -> None:
    """Every figure of the objective over the steps, one line each, as PNG."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(name for record in history for name in record if name not in HIDDEN)
    for name in names:
        if name.startswith("eval_") and name != "eval_loss":
            continue  # the Trainer's timings
        points = [(record["step"], record[name]) for record in history if name in record]
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if name == "eval_loss" else None, linewidth=1)
    axes.set(xlabel="step", ylabel="loss and its parts")
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))
