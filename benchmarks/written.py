"""Blocks of a document that a script writes, so that nobody else does."""

from __future__ import annotations

from collections.abc import Sequence


def marks(what: str) -> tuple[str, str]:
    """The lines before and after the block that `python -m benchmarks.<what>` writes."""
    return f"<!-- {what}: written by `python -m benchmarks.{what}` -->", f"<!-- end of {what} -->"


def with_block(document: str, what: str, sections: Sequence[str], *, name: str) -> str:
    """The document of that name with these sections between its two marks, and nothing else there.

    Raises:
        SystemExit: it has no such marks.
    """
    begin, end = marks(what)
    if begin not in document or end not in document:
        raise SystemExit(f"{name} has no place for the {what}; put these two lines where they belong:\n{begin}\n{end}")
    before, rest = document.split(begin)
    _, after = rest.split(end)
    return "\n\n".join([before + begin, *sections, end]) + after
