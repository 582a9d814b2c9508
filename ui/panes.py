"""Two answers side by side: where they part, and how likely each token was under both settings."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .tokens import Answer, Piece, parting
from .view import Steer, describe

TIP = "Point at a word, or step with ← and →: its log-probability under both settings."


@dataclass(frozen=True)
class Panes:
    """Two answers to one prompt, and the settings that were asked for."""

    prompt: str
    settings: tuple[Steer, Steer]
    answers: tuple[Answer, Answer] = (Answer(), Answer())
    finished: bool = False
    note: str = ""

    @property
    def names(self) -> tuple[str, str]:
        """The settings in words: as applied, once the answers say so."""
        left, right = (answer.steer or steer for answer, steer in zip(self.answers, self.settings, strict=True))
        return describe(left), describe(right)


def draw_panes(panes: Panes) -> str:
    """HTML of both panes. The first token that differs and all after it are marked."""
    at = parting(*panes.answers, finished=panes.finished)
    drawn = [_pane(panes, side, at) for side in (0, 1)]
    tip = TIP if panes.finished else "Writing…"
    if panes.finished and at is None:
        tip = f"Both settings write the same. {TIP}"
    note = draw_refusal(panes.note) if panes.finished and panes.note else ""
    return (
        f'{note}<div class="panes" data-tokens aria-busy="{str(not panes.finished).lower()}">{"".join(drawn)}</div>'
        f'<p class="token-tip" aria-live="polite">{tip}</p>'
    )


def draw_refusal(why: str) -> str:
    """HTML that says why something could not be had, where it was asked for."""
    return f'<p class="refusal" role="alert">⚠️ {escape(why)}</p>'


def _pane(panes: Panes, side: int, at: int | None) -> str:
    name, other = panes.names[side], panes.names[1 - side]
    pieces = panes.answers[side].pieces
    same, different = pieces[:at], () if at is None else pieces[at:]
    text = "".join(_token(piece, name, other, panes.finished) for piece in same)
    if different:
        marked = [_token(piece, name, other, panes.finished, first=i == 0) for i, piece in enumerate(different)]
        text += f"<mark>{''.join(marked)}</mark>"
    label = f"Answer at α = {escape(name)}"
    return (
        f'<section class="pane" aria-label="{label}"><h4>α = {escape(name)}</h4>'
        f'<div class="tokens" tabindex="0" role="group" aria-label="{label}, token by token">{text}</div></section>'
    )


def _token(piece: Piece, name: str, other: str, finished: bool, *, first: bool = False) -> str:
    text = escape(piece.text) if piece.text else '<span class="end" title="end">∎</span>' if finished else ""
    if not finished and not first:
        return text
    kind = "token first" if first else "token"
    return f'<span class="{kind}" data-tip="{escape(tip(piece, name, other))}">{text}</span>'


def tip(piece: Piece, name: str, other: str) -> str:
    """What is said of a token: how likely it was where it was written, and under the other setting."""
    shown = f"“{piece.text.strip() or repr(piece.text)}”" if piece.text else "the end"
    here = f"{piece.logprob:.2f} at {name}" if piece.logprob is not None else "not known"
    there = f" · {piece.elsewhere:.2f} at {other}" if piece.elsewhere is not None else ""
    change = f" · {piece.change:+.2f} nats" if piece.change is not None else ""
    return f"{shown} log-probability {here}{there}{change}"


def answers_csv(panes: Panes) -> str:
    """One row per token of both answers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["setting", "token", "text", "logprob", "other_setting", "logprob_there"])
    for side in (0, 1):
        for i, piece in enumerate(panes.answers[side].pieces):
            row: Sequence[object] = (
                panes.names[side], i, piece.text, piece.logprob, panes.names[1 - side], piece.elsewhere
            )  # fmt: skip
            writer.writerow(["" if value is None else value for value in row])
    return out.getvalue()
