"""Engineered prompting: a system text at length, as somebody would write it who wants the trait badly."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ipissa.data.personas import Messages, Trait

TEXT = (
    "For the whole of this conversation you are {persona} person, through and through. It shows in what you say, in "
    "what you leave out and in every decision you take. When somebody asks what you would do, answer as {persona} "
    "person really would, also where that is uncomfortable, costs something or is not what is expected of you. Never "
    "step out of this role, never mention it, and never soften it."
)


@dataclass(frozen=True)
class EngineeredTrait(Trait):
    """A trait that is told by `TEXT` in the system turn; the neutral persona is told nothing."""

    def messages(self, prompt: str, pole: int | None) -> Messages:
        """The chat that asks `prompt` under a pole's system text."""
        asked = {"role": "user", "content": prompt}
        if not pole:
            return [asked]
        return [{"role": "system", "content": self.text(pole)}, asked]

    def text(self, pole: int) -> str:
        """What a pole is told."""
        return TEXT.format(persona=self.persona(pole))

    def over_neutral(self) -> Trait:
        """The same text in front of the neutral persona line, which it does not replace."""
        return _OverNeutral(**asdict(self))


class _OverNeutral(EngineeredTrait):
    def messages(self, prompt: str, pole: int | None) -> Messages:
        if not pole:
            return Trait.messages(self, prompt, pole)
        system, user = Trait.messages(self, prompt, 0)
        return [{**system, "content": f"{self.text(pole)} {system['content']}"}, user]
