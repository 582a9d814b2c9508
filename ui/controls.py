"""What every tab of the page shares: the client, the users' turns, and the components that make up a `View`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from .client import Client
from .dial import dial_value, dials, dials_of, start
from .turns import Turns
from .view import BASE, COMPARISONS, OTHER, RANGES, View

Adapters = list[dict[str, Any]]
FORGOTTEN = "This page was left alone for too long; load it again, which keeps its settings."


@dataclass(frozen=True)
class Asked:
    """What a handler was called with."""

    user: str
    key: str
    adapters: Adapters
    dials: list[dict[str, Any]]  # as on the page
    moved: int  # how often a dial of this page had been moved
    view: View
    rest: tuple[Any, ...]  # the values of the tab's own components

    @property
    def passing(self) -> float:
        """The order of what only shows the position: whatever else is asked at it shows more, and is not overtaken."""
        return self.moved - 0.5

    @property
    def model(self) -> str:
        """The base model's name."""
        return self.adapters[0]["parent"]

    @property
    def sampling(self) -> dict[str, Any]:
        """How answers are sampled."""
        view = self.view
        return {
            "model": self.model,
            "max_tokens": view.max_tokens,
            "temperature": view.temperature,
            "seed": view.seed,
        }


class Controls:
    """The shared components, not yet placed; a tab renders those it shows.

    Events that follow a drag take `quick`, those that stream or take long `slow`.
    """

    quick: dict[str, Any] = {  # noqa: RUF012 (options, never changed)
        "queue": False,
        "show_progress": "hidden",
        "api_visibility": "private",
        "concurrency_limit": None,
    }
    slow: dict[str, Any] = {  # noqa: RUF012
        "show_progress": "hidden",
        "api_visibility": "private",
        "concurrency_limit": None,
        "trigger_mode": "multiple",
    }

    def __init__(self, client: Client) -> None:
        usual = View()
        later: dict[str, Any] = {"render": False}
        self.client = client
        self.scores, self.generations, self.readings, self.conversations = Turns(), Turns(), Turns(), Turns()
        self.key = gr.Textbox(label="API key", type="password", visible=False, elem_id="api-key", **later)
        self.adapters = gr.State([], **later)
        self.url = gr.State(client.url, **later)  # where the user finds the server
        self.dial = dials(label="α", elem_id="dial", **later)
        self.compare = gr.Radio(list(COMPARISONS), value=BASE, label="Compare with", elem_id="compare", **later)
        self.other = dials(label="α of the other setting", elem_id="other-dial", visible=False, **later)
        self.prompt = gr.Textbox(usual.prompt, label="Prompt", lines=2, scale=2, elem_id="prompt", **later)
        self.question = gr.Textbox(usual.question, label="Question", lines=2, elem_id="question", **later)
        self.prefix = gr.Textbox(usual.prefix, label="The answer begins with", elem_id="prefix", **later)
        self.choices = gr.Textbox(usual.choices, label="Choices", elem_id="choices", **later)
        tokens, temperatures, (least, most) = RANGES["max_tokens"], RANGES["temperature"], RANGES["seed"]
        self.max_tokens = gr.Slider(*tokens, value=usual.max_tokens, step=8, label="Tokens", **later)
        self.temperature = gr.Slider(*temperatures, value=usual.temperature, step=0.1, label="Temperature", **later)
        self.seed = gr.Number(usual.seed, label="Seed", precision=0, minimum=least, maximum=most, **later)

    @property
    def settings(self) -> list[Any]:
        """The components of a `View`, in the order `asked` reads and `restored` writes them."""
        return [
            self.dial,
            self.compare,
            self.other,
            self.prompt,
            self.question,
            self.prefix,
            self.choices,
            self.max_tokens,
            self.temperature,
            self.seed,
        ]

    @property
    def inputs(self) -> list[Any]:
        """What every handler takes first."""
        return [self.key, self.adapters, *self.settings]

    def leave(self, request: gr.Request) -> None:
        """A user has closed the page."""
        for turns in (self.scores, self.generations, self.readings, self.conversations):
            turns.forget(request.session_hash or "")

    def asked(self, request: gr.Request, values: Sequence[Any]) -> Asked | None:
        """A handler's values; None before any adapter is known, when nothing can be asked.

        Raises:
            gr.Error: the page has dials, but its session was thrown away: an hour after a connection broke.
        """
        key, adapters, dial, compare, other, prompt, question, prefix, choices, max_tokens, temperature, seed, *rest = (
            values
        )
        if not dial["dials"]:
            return None
        if not adapters:
            raise gr.Error(FORGOTTEN, print_exception=False)
        view = View(
            alphas=dial["alphas"],
            held=dial["held"],
            compare=compare,
            other=other["alphas"],
            prompt=prompt,
            question=question,
            prefix=prefix,
            choices=choices,
            max_tokens=int(max_tokens),
            temperature=temperature,
            seed=int(seed or 0),
        )
        return Asked(
            request.session_hash or "",
            key or "",
            adapters,
            dial["dials"],
            max(dial["moved"], other["moved"]),
            view,
            tuple(rest),
        )

    def restored(self, view: View, adapters: Adapters) -> list[Any]:
        """Values of `settings` that show the view."""
        found = dials_of(adapters)
        alphas = view.alphas or start(found)
        return [
            dial_value(found, alphas, view.held),
            view.compare,
            gr.update(value=dial_value(found, view.other, ""), visible=view.compare == OTHER),
            view.prompt,
            view.question,
            view.prefix,
            view.choices,
            view.max_tokens,
            view.temperature,
            view.seed,
        ]
