"""Personas: how two words become the two poles of a dial."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ipissa.errors import ConfigError

TEMPLATE = "Pretend you're {persona} person."
NEUTRAL = "a"
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Trait:
    """Two opposite personas and a neutral one, as phrases that fill `template`.

    `positive` is what α = +1 means and `negative` what α = -1 means. The neutral persona says
    "pretend" and nothing else: any persona line shifts a model, and comparing with the neutral
    one separates the trait from that shift.
    """

    positive: str
    negative: str
    neutral: str = NEUTRAL
    template: str = TEMPLATE

    @classmethod
    def from_words(cls, positive: str, negative: str) -> Trait:
        """A trait from two words or short phrases: `honest` becomes `an honest`."""
        phrases = [_with_article(words, option) for words, option in ((positive, "positive"), (negative, "negative"))]
        if phrases[0] == phrases[1]:
            raise ConfigError(f"positive and negative are both {positive!r}; give two opposite words.")
        return cls(*phrases)

    def persona(self, pole: int) -> str:
        """The phrase of pole +1, -1, or 0 for the neutral one."""
        return {1: self.positive, -1: self.negative, 0: self.neutral}[pole]

    def messages(self, prompt: str, pole: int | None) -> Messages:
        """The chat that asks `prompt` under a pole's persona, or plainly for None.

        The persona line stands in the system turn and before the user's text.
        """
        if pole is None:
            return [{"role": "user", "content": prompt}]
        line = self.template.format(persona=self.persona(pole))
        return [{"role": "system", "content": line}, {"role": "user", "content": f"{line} {prompt}"}]

    def over_neutral(self) -> Trait:
        """Who tells a pole to somebody who was told to be the neutral persona: here the pole takes its place."""
        return self

    def to_metadata(self) -> dict[str, str]:
        """The `trait` metadata of an adapter file."""
        return asdict(self)


def _with_article(words: str, option: str) -> str:
    words = " ".join(words.split())
    if not words:
        raise ConfigError(f"{option} is empty; give a word such as 'honest'.")
    if words.split()[0].lower() in ("a", "an", "the"):
        return words
    import inflect  # takes longer than all else that serving an adapter imports from here

    return inflect.engine().a(words)
