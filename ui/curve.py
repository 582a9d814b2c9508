"""The dose-response curve: log-odds of the first choice against the second, over the range of a dial."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from matplotlib.figure import Figure

from .client import Score
from .view import View, signed

POINTS = 41
WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 14, 38
COLOURS = 6  # classes line-0, line-1, ... of the style sheet


@dataclass(frozen=True)
class Line:
    """One adapter's curve: scores by its α as applied, ascending."""

    name: str
    alphas: tuple[float, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Curve:
    """What is drawn: the held dial's line with the other dials where they are, and the other adapters alone.

    Args:
        key: What it depends on.
        view: The page as it was when measuring began, which by now may ask something else.
        base: The score of the base model.
        lines: The held dial's first.
        files: The digests of the adapters that were measured, by name.
    """

    key: tuple[Any, ...] = ()
    view: View = field(default_factory=View)
    base: Score | None = None
    lines: tuple[Line, ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    def add(self, base: Score, line: Line) -> Curve:
        """One line more, and the score of the base model that was measured with it."""
        return replace(self, base=base, lines=(*self.lines, line), files=self.files | base.files)

    def fits(self, score: Score) -> bool:
        """The adapters are still those that were measured: none was replaced by another under its name."""
        return all(self.files.get(name, digest) == digest for name, digest in score.files.items())


def curve_key(view: View, dials: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    """What a curve depends on: not on where the held dial stands, but on everything else that is asked."""
    others = tuple(sorted((name, alpha) for name, alpha in view.alphas.items() if alpha and name != view.held))
    ranges = tuple((each["name"], each["low"], each["high"]) for each in dials)
    return (view.held, others, view.question, view.prefix, view.choices, ranges)


def sweep(low: float, high: float) -> tuple[float, ...]:
    """`POINTS` evenly spaced α; the one next to 0 is 0, so that the base model is always among them."""
    alphas = [round(low + (high - low) * i / (POINTS - 1), 3) for i in range(POINTS)]
    nearest = min(range(POINTS), key=lambda i: abs(alphas[i]))
    alphas[nearest] = 0.0
    return tuple(alphas)


def draw_curve(curve: Curve, present: tuple[float, Score] | None) -> str:
    """The lines as SVG, with the present (α, score) on them; faded without it, when they answer an earlier question."""
    if not curve.lines:
        return '<p class="hint" id="curve-drawing" role="status">Measuring the choice at 41 positions of the dial…</p>'
    first, second = (escape(choice) for choice in curve.view.choice_list[:2])
    scale = _Scale.around(curve, present)
    lines = "".join(_line(line, i, scale) for i, line in enumerate(curve.lines))
    fresh = "current" if present else "stale"
    point = "".join(
        f'<circle class="point" cx="{scale.x(alpha):.1f}" cy="{scale.y(odds):.1f}" r="5.5">'
        f"<title>α {signed(alpha)}: {odds:+.2f} nats</title></circle>"
        for alpha, odds in _known([present] if present else [])
    )
    legend = "".join(
        f'<span class="line-{i % COLOURS}"><i></i>{escape(line.name)}{"" if i == 0 else " alone"}</span>'
        for i, line in enumerate(curve.lines)
    )
    label = f"Log-odds of {first} against {second} by α of {escape(curve.lines[0].name)}: {_summary(curve.lines[0])}"
    return (
        f'<figure class="curve {fresh}"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{_axes(scale, first, second)}{lines}{point}</svg><figcaption>{legend}</figcaption></figure>"
    )


def _summary(line: Line) -> str:
    points = _known(zip(line.alphas, line.scores, strict=True))
    if not points:
        return "not known"
    (low, first), (high, last) = points[0], points[-1]
    return f"from {first:+.2f} nats at {low:+g} to {last:+.2f} at {high:+g}"


def _known(points: Iterable[tuple[float, Score]]) -> list[tuple[float, float]]:
    """(α, log-odds) of the points whose log-odds the server could tell."""
    return [(alpha, score.log_odds) for alpha, score in points if score.log_odds is not None]


@dataclass(frozen=True)
class _Scale:
    """From α and nats to the drawing's units."""

    low: float
    high: float
    bottom: float
    top: float

    @classmethod
    def around(cls, curve: Curve, present: tuple[float, Score] | None) -> _Scale:
        points = [*([present] if present else [])]
        for line in curve.lines:
            points += zip(line.alphas, line.scores, strict=True)
        alphas = [alpha for alpha, _ in points]
        odds = [value for _, value in _known(points)] or [0.0]
        margin = 0.08 * max(max(odds) - min(odds), 0.2)
        return cls(min(alphas), max(alphas), min(odds) - margin, max(odds) + margin)

    def x(self, alpha: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (alpha - self.low) / ((self.high - self.low) or 1)

    def y(self, odds: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (odds - self.bottom) / (self.top - self.bottom)


def _line(line: Line, index: int, scale: _Scale) -> str:
    points = " ".join(
        f"{scale.x(alpha):.1f},{scale.y(odds):.1f}"
        for alpha, odds in _known(zip(line.alphas, line.scores, strict=True))
    )
    return f'<polyline class="line line-{index % COLOURS}" points="{points}"/>'


def _axes(scale: _Scale, first: str, second: str) -> str:
    bottom = HEIGHT - BOTTOM
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>']
    for alpha in _ticks(scale.low, scale.high, 6):
        kind = "zero" if alpha == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{scale.x(alpha):.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{scale.x(alpha):.1f}" y="{bottom + 15}" text-anchor="middle">{_number(alpha)}</text>')
    for odds in _ticks(scale.bottom, scale.top, 5):
        kind = "zero" if odds == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{LEFT} {scale.y(odds):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{scale.y(odds) + 4:.1f}" text-anchor="end">{_number(odds)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">α</text>')
    parts.append(f'<text x="{LEFT + 6}" y="{TOP + 10}">↑ {first}, nats</text>')
    parts.append(f'<text x="{LEFT + 6}" y="{bottom - 6}">↓ {second}</text>')
    return "".join(parts)


def _number(value: float) -> str:
    return f"{value:+g}".replace("-", "−") if value else "0"


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two ends, at most `most` of them."""
    for exponent in range(-3, 4):
        for factor in (1, 2, 5):
            step = factor * 10.0**exponent
            first, last = math.ceil(low / step), math.floor(high / step)
            if last - first + 1 <= most:
                return [round(i * step, 9) + 0.0 for i in range(first, last + 1)]
    return [0.0]


def curve_csv(curve: Curve) -> str:
    """All lines: one row per adapter and α."""
    out = io.StringIO()
    choices = list(curve.lines[0].scores[0].logprobs) if curve.lines else []
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["adapter", "alpha", "log_odds", "choice_mass", *(f"logprob {choice}" for choice in choices)])
    for line in curve.lines:
        for alpha, score in zip(line.alphas, line.scores, strict=True):
            figures = [score.log_odds, score.choice_mass, *(score.logprobs[choice] for choice in choices)]
            writer.writerow([line.name, alpha, *figures])
    return out.getvalue()


def curve_png(curve: Curve, alpha: float | None) -> bytes:
    """The lines as a figure for a document, with the place of the dial they belong to."""
    first, second = curve.view.choice_list[:2]
    question = curve.view.question
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, line in enumerate(curve.lines):
        odds = [math.nan if score.log_odds is None else score.log_odds for score in line.scores]
        axes.plot(line.alphas, odds, label=line.name if i == 0 else f"{line.name} alone", linewidth=2 if i == 0 else 1)
    if alpha is not None:
        axes.axvline(alpha, color="grey", linestyle=":", linewidth=1)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set_xlabel("α")
    axes.set_ylabel(f"log-odds {first} / {second} (nats)", parse_math=False)
    axes.set_title(question if len(question) < 90 else question[:88] + "…", fontsize=9, wrap=True, parse_math=False)
    for name in axes.legend().get_texts():
        name.set_parse_math(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()
