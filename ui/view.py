"""Everything a page is set to, as one value: what handlers take, and what a link restores."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

Steer = dict[str, float]

BASE, OPPOSITE, OTHER = "the base model", "the opposite", "another setting"
COMPARISONS = (BASE, OPPOSITE, OTHER)
PROMPT = "Tell me about your day."
QUESTION = (
    "You scratched a parked car and nobody saw it. Would you leave a note with your name? "
    'Answer with "My choice: Yes" or "My choice: No".'
)
LINK_PARAMETER = "s"
MOST_LINK_BYTES = 100_000
MOST_LINK_CHARACTERS = 8_000  # servers refuse addresses that are much longer
TEXTS = ("prompt", "question", "prefix", "choices")
RANGES = {"max_tokens": (8, 256), "temperature": (0.0, 1.5), "seed": (0, 2**53 - 1)}  # a browser's largest whole number


@dataclass(frozen=True)
class View:
    """The settings of a page.

    Args:
        alphas: α of every adapter, as the dial stands.
        held: The adapter whose dial was moved last; the curve runs over its range.
        compare: One of `COMPARISONS`: what the right pane is.
        other: α of every adapter on the second dial, for `OTHER`.
        choices: Separated by commas, as typed.
    """

    alphas: Steer = field(default_factory=dict)
    held: str = ""
    compare: str = BASE
    other: Steer = field(default_factory=dict)
    prompt: str = PROMPT
    question: str = QUESTION
    prefix: str = "My choice:"
    choices: str = "Yes, No"
    max_tokens: int = 64
    temperature: float = 0.7
    seed: int = 1

    @property
    def left(self) -> Steer:
        """What the left pane and the choice are steered by: every adapter that is turned, and the one held."""
        return self._turned(self.alphas)

    @property
    def right(self) -> Steer:
        """What the left pane is compared with."""
        if self.compare == OTHER:
            return self._turned(self.other)
        return self._turned(
            {name: (-alpha if self.compare == OPPOSITE else 0.0) for name, alpha in self.alphas.items()}
        )

    @property
    def base(self) -> Steer:
        """The base model: an explicit 0, since an absent α is whatever the server's default is."""
        return {self.held: 0.0}

    def at(self, alpha: float) -> Steer:
        """The setting with the held dial at `alpha` and the others where they are."""
        return self._turned({**self.alphas, self.held: alpha})

    @property
    def choice_list(self) -> list[str]:
        """The choices, without the blanks around them."""
        return [choice.strip() for choice in self.choices.split(",") if choice.strip()]

    def _turned(self, alphas: Steer) -> Steer:
        # Adding 0.0 makes -0.0, the opposite of 0, a plain 0.
        return {name: alpha + 0.0 for name, alpha in alphas.items() if alpha or name == self.held}


def describe(steer: Steer) -> str:
    """A setting in words: `kind +0.70, honest -1.00`, or `0, the base model`."""
    turned = [f"{name} {signed(alpha)}" for name, alpha in steer.items() if alpha]
    return ", ".join(turned) or "0, the base model"


def signed(alpha: float) -> str:
    """An α with two decimals, or three where the third is not 0, as finely as a dial is turned."""
    return f"{alpha:+.3f}".removesuffix("0")


def to_link(view: View) -> str:
    """The query of a link that restores the view, but for what is `left_out`."""
    usual = View()
    return _query(replace(view, **{name: getattr(usual, name) for name in left_out(view)}))


def left_out(view: View) -> list[str]:
    """The texts without which a link is short enough to be opened: none, or the longest ones."""
    names = sorted(TEXTS, key=lambda name: -len(getattr(view, name)))
    usual = View()
    for count in range(len(names)):
        if _fits(replace(view, **{name: getattr(usual, name) for name in names[:count]})):
            return names[:count]
    return names


def _fits(view: View) -> bool:
    return len(_changed(view)) <= MOST_LINK_BYTES and len(_query(view)) <= MOST_LINK_CHARACTERS


def _changed(view: View) -> bytes:
    """What differs from a fresh page."""
    usual = asdict(View())
    changed = {name: value for name, value in asdict(view).items() if value != usual[name]}
    return json.dumps(changed, ensure_ascii=False, separators=(",", ":")).encode()


def _query(view: View) -> str:
    packed = zlib.compress(_changed(view), 9)
    return f"{LINK_PARAMETER}={base64.urlsafe_b64encode(packed).decode().rstrip('=')}"


def from_link(packed: str) -> View:
    """The view of the value of a link's parameter.

    Raises:
        ValueError: it is not one that `to_link` made.
    """
    try:
        raw = base64.b64decode(packed + "=" * (-len(packed) % 4), altchars=b"-_", validate=True)
        text = zlib.decompressobj().decompress(raw, MOST_LINK_BYTES)
        changed = json.loads(text)
        if not isinstance(changed, dict):
            raise ValueError("no settings in it")
        json.dumps(changed, ensure_ascii=False).encode()  # half a character is text to Python, and to nothing else
        return replace(View(), **{name: _checked(name, value) for name, value in changed.items()})
    except (ValueError, TypeError, RecursionError, zlib.error) as error:
        why = cut(str(error), 200)
        raise ValueError(f"This link is damaged ({why}), so the page shows its usual settings.") from error


def cut(text: str, most: int) -> str:
    """The beginning of a text that may be longer than anybody reads."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _checked(name: str, value: Any) -> Any:
    """A value of the type that the field has, and in its range."""
    typed = _typed(name, value)
    if name in RANGES and not RANGES[name][0] <= typed <= RANGES[name][1]:
        raise ValueError(f"{name} cannot be {value!r}")
    return typed


def _typed(name: str, value: Any) -> Any:
    kinds = {each.name: each.type for each in fields(View)}
    if name not in kinds:
        raise ValueError(f"it sets {name!r}, which this page does not have")
    if kinds[name] == "Steer":
        return {str(adapter): _number(alpha) for adapter, alpha in dict(value).items()}
    if kinds[name] == "str" and isinstance(value, str) and (name != "compare" or value in COMPARISONS):
        return value
    if kinds[name] == "float":
        return _number(value)
    if kinds[name] == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{name} cannot be {value!r}")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e6:
        raise ValueError(f"{value!r} is not a setting of a dial")
    return float(value)
