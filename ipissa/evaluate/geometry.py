"""A drawing of what the contrastive loss asks for, in the plane of the preference direction and one across it.

python -m ipissa.evaluate.geometry docs/loss-geometry.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

Point = tuple[float, float]

REJECTED: Point = (-0.9, -0.3)
CHOSEN: Point = (0.9, 0.3)
AT_PLUS: Point = (1.75, 0.75)  # the chosen side's state at α = +1
AT_MINUS: Point = (-1.9, -0.85)  # the rejected side's at α = -1
COHERENT = 1.25  # how far a state may move before its own tokens lose more than τ nats


def loss_geometry() -> Figure:
    """States of one pair and how steering moves them, each vector with its name."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for state, name in ((CHOSEN, "h chosen"), (REJECTED, "h rejected")):
        axis.plot(*state, "o", color="black")
        axis.annotate(name, state, xytext=(6, -14), textcoords="offset points")
        axis.add_patch(Circle(state, COHERENT, fill=False, linestyle=":", color="grey"))
    _vector(axis, (-2.6, -1.6), (-1.4, -1.6), "u, preference direction", "grey")
    _vector(axis, REJECTED, CHOSEN, "reference separation", "black", label=(-20, 16))
    _vector(axis, CHOSEN, AT_PLUS, "α = +1", "tab:blue")
    _vector(axis, REJECTED, AT_MINUS, "α = -1", "tab:orange", label=(10, -20))
    for start, end, name, label in (
        (CHOSEN, AT_PLUS, "projection at +1", -30),
        (REJECTED, AT_MINUS, "projection at -1", 5),
    ):
        axis.plot([start[0], end[0]], [start[1], start[1]], color="tab:green", linewidth=2)
        axis.plot([end[0], end[0]], [start[1], end[1]], color="grey", linewidth=0.8, linestyle="--")
        axis.annotate(name, ((start[0] + end[0]) / 2, start[1]), xytext=(-30, label), textcoords="offset points",
                      fontsize=8, color="tab:green")  # fmt: skip
    axis.annotate("coherent: own tokens lose at most τ", (CHOSEN[0], CHOSEN[1] + COHERENT), ha="center", fontsize=8,
                  xytext=(0, 3), textcoords="offset points", color="grey")  # fmt: skip
    axis.set_xlim(-3, 3)
    axis.set_ylim(-1.9, 1.9)
    axis.set_aspect("equal")
    axis.set_axis_off()
    return figure


def write_loss_geometry(path: Path) -> None:
    """As an SVG whose texts are texts, the same bytes every time."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ipissa"}):
        loss_geometry().savefig(path, format="svg", metadata={"Date": None})


def _vector(axis: Axes, start: Point, end: Point, name: str, colour: str, *, label: Point = (0, 8)) -> None:
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6})
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    axis.annotate(name, middle, xytext=label, textcoords="offset points", ha="center", fontsize=9, color=colour)


if __name__ == "__main__":
    write_loss_geometry(Path(sys.argv[1]))
