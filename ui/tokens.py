"""Tokens as a page shows them: pieces of text with their log-probabilities, and where two answers part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .view import Steer

UNFINISHED = "\ufffd"  # what bytes that are no character decode to


@dataclass(frozen=True)
class Piece:
    """A token, or the several tokens that make one character.

    Args:
        text: What it adds to the text; empty for an end token.
        ids: Of its tokens.
        logprob: Of its tokens together, where it was written; None at the beginning of a text.
        elsewhere: The same under the other setting, where it is known.
    """

    text: str
    ids: tuple[int, ...]
    logprob: float | None
    elsewhere: float | None = None

    @property
    def change(self) -> float | None:
        """How much likelier it is here than elsewhere, in nats."""
        return None if self.logprob is None or self.elsewhere is None else self.logprob - self.elsewhere


@dataclass(frozen=True)
class Answer:
    """What was written so far: whole pieces, and tokens whose text has not come yet.

    Args:
        pieces: In order.
        pending: (id, log-probability) of the tokens without text.
        steer: The α that were applied, which the server may have rounded; empty until it has said so.
    """

    pieces: tuple[Piece, ...] = ()
    pending: tuple[tuple[int, float | None], ...] = ()
    steer: Steer = field(default_factory=dict)

    def add(self, text: str, token_id: int, logprob: float | None, *, last: bool = False) -> Answer:
        """One token more. It becomes a piece with those before it as soon as they have text."""
        pending = (*self.pending, (token_id, logprob))
        if not text and not last:
            return replace(self, pending=pending)
        ids = tuple(each for each, _ in pending)
        piece = Piece(text, ids, total([value for _, value in pending]))
        return replace(self, pieces=(*self.pieces, piece), pending=())

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def ids(self) -> list[int]:
        """All tokens with text, and the end token."""
        return [each for piece in self.pieces for each in piece.ids]

    def against(self, logprobs: Sequence[float | None]) -> Answer:
        """The answer with the log-probability of every token under another setting."""
        found, at = [], 0
        for piece in self.pieces:
            end = at + len(piece.ids)
            found.append(replace(piece, elsewhere=total(logprobs[at:end])))
            at = end
        return replace(self, pieces=tuple(found))


def total(logprobs: Sequence[float | None]) -> float | None:
    """The log-probability of tokens together."""
    known = [value for value in logprobs if value is not None]
    return sum(known) if known and len(known) == len(logprobs) else None


def parting(left: Answer, right: Answer, *, finished: bool) -> int | None:
    """Index of the first piece where two answers differ; None while they do not.

    Of unfinished answers one may be a step ahead; once they are finished, the end of one is a difference.
    """
    for i, (one, two) in enumerate(zip(left.pieces, right.pieces, strict=False)):
        if one.ids != two.ids:
            return i
    shorter, longer = sorted((len(left.pieces), len(right.pieces)))
    return shorter if finished and shorter != longer else None


def pieces_of(text: str, tokens: Sequence[tuple[str, int, float | None]]) -> Answer:
    """A given text cut where its tokens end.

    Args:
        text: The whole text.
        tokens: (text on its own, id, log-probability) of every token. A token's own text may lack a leading
            space or be part of a character, so it is looked for in the whole.
    """
    answer, at = Answer(), 0
    for i, (shown, token_id, logprob) in enumerate(tokens):
        last = i == len(tokens) - 1
        end = len(text) if last else at
        if not last and UNFINISHED not in shown and shown:
            found = text.find(shown, at)
            end = found + len(shown) if 0 <= found <= at + 1 + len(answer.pending) else at
        # A token that only begins the text has neither text nor log-probability, and would take the first word's.
        begins = not answer.ids and logprob is None and end == at and UNFINISHED not in shown
        answer = answer.add(text[at:end], token_id, logprob, last=last or begins)
        at = end
    return answer
