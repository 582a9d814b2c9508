"""Where steering acts: one text read under two settings, every token coloured by what the change did to it."""

from __future__ import annotations

from html import escape

from .tokens import Answer, Piece
from .view import Steer, describe

FAINTEST_FULL = 0.25  # nats; where all changes are smaller, none has its full colour


def draw_heatmap(answer: Answer, left: Steer, right: Steer) -> str:
    """HTML of the text: blue where the left setting makes a token likelier, red where the right one does."""
    one, two = describe(left), describe(right)
    known = [piece for piece in answer.pieces if piece.change is not None]
    if not known:
        return '<p class="hint">The text is too short to compare; write a few words.</p>'
    mean = sum(piece.change or 0.0 for piece in known) / len(known)
    full = max(FAINTEST_FULL, *(abs(piece.change or 0.0) for piece in known))
    tokens = "".join(_token(piece, one, two, full) for piece in answer.pieces)
    extremes = sorted(known, key=lambda piece: piece.change or 0.0)
    told = [
        f"{len(known)} tokens; on average {mean:+.3f} nats per token in favour of {escape(one)}.",
        f"Most against it: {_named(extremes[:3])}. Most for it: {_named(extremes[:-4:-1])}.",
    ]
    return (
        f'<div data-tokens><div class="legend"><span><i class="less"></i>likelier at {escape(two)}</span>'
        f'<span><i class="more"></i>likelier at {escape(one)}</span><span>full colour: {full:.2f} nats</span></div>'
        f'<div class="tokens heat" tabindex="0" role="group" aria-label="Text, token by token">{tokens}</div></div>'
        f'<p class="token-tip" aria-live="polite">Point at a word, or step with ← and →.</p><p>{" ".join(told)}</p>'
    )


def _named(pieces: list[Piece]) -> str:
    return ", ".join(f"“{escape(piece.text.strip())}” {piece.change:+.2f}" for piece in pieces)


def _token(piece: Piece, one: str, two: str, full: float) -> str:
    text = escape(piece.text)
    if piece.change is None:
        return f"<span>{text}</span>"
    share = abs(piece.change) / full
    kind = "more" if piece.change > 0 else "less"
    tip = (
        f"“{piece.text.strip()}” log-probability {piece.logprob:.2f} at {one} · {piece.elsewhere:.2f} at {two} · "
        f"{piece.change:+.2f} nats"
    )
    return f'<span class="token {kind}" style="--share:{share:.2f}" data-tip="{escape(tip)}">{text}</span>'
