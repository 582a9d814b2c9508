"""Keep and share: a link, the requests as code, and files."""

from __future__ import annotations

import asyncio
from typing import Any

import gradio as gr

from ..controls import Controls
from ..curve import Curve, curve_csv, curve_png
from ..panes import Panes, answers_csv, draw_refusal
from ..share import ANSWERS, CHOICE, FORMS, as_file, snippet
from ..view import left_out, to_link

CURVE_CSV, CURVE_PNG, ANSWERS_CSV = "Curve (CSV)", "Curve (PNG)", "Answers (CSV)"


class ShareTab:
    """Layout and handlers."""

    def __init__(self, controls: Controls, panes: gr.State, curve: gr.State) -> None:
        self.controls, self.panes, self.curve = controls, panes, curve
        self.query = gr.Textbox(visible="hidden", elem_id="query")
        with gr.Row(equal_height=False):
            # A copy button inside the text box would take the box's label for its own.
            self.link = gr.Textbox(label="Link that restores this page", interactive=False, scale=5, elem_id="link")
            self.copy = gr.Button("Copy the link", size="md", min_width=120, elem_id="copy-link")
        self.note = gr.HTML(elem_id="link-note", apply_default_css=False)
        with gr.Row():
            self.what = gr.Radio([ANSWERS, CHOICE], value=ANSWERS, label="Request for", elem_id="snippet-what")
            self.form = gr.Radio(list(FORMS), value="curl", label="As", elem_id="snippet-form")
        self.code = gr.Code(language="shell", label="Request", interactive=False, elem_id="snippet", wrap_lines=True)
        with gr.Row():
            self.files = {name: gr.Button(name, size="md") for name in (CURVE_CSV, CURVE_PNG, ANSWERS_CSV)}
        self.file = gr.JSON(visible="hidden")

    @property
    def inputs(self) -> list[Any]:
        """What `describe` takes."""
        return [*self.controls.inputs, self.what, self.form, self.controls.url]

    @property
    def described(self) -> list[Any]:
        """What `describe` writes."""
        return [self.query, self.note, self.code]

    def listen(self) -> None:
        """The link follows every change, also in the address bar, so that reloading keeps the page as it is."""
        c = self.controls
        changed = [c.dial.release, c.other.release]
        changed += [each.change for each in (c.compare, c.prompt, c.question, c.prefix, c.choices)]
        changed += [self.what.change, self.form.change]
        following: dict[str, Any] = {"trigger_mode": "always_last", **c.quick}
        gr.on(changed, self.describe, self.inputs, self.described, **following)
        # A number that is being typed may be out of its range, which Gradio brings it into only after telling of it.
        typed = [c.max_tokens.release, c.temperature.release, c.seed.blur, c.seed.submit]
        gr.on(typed, None, None, None, js="() => {}").then(self.describe, self.inputs, self.described, **following)
        self.query.change(None, self.query, self.link, js="ipissa.remember")
        self.copy.click(None, self.link, None, js="ipissa.copy")
        for name, button in self.files.items():
            made = button.click(self.make, [gr.State(name), *c.inputs, self.curve, self.panes], self.file, **c.quick)
            made.then(None, self.file, None, js="ipissa.save")

    async def describe(self, request: gr.Request, *values: Any) -> tuple[Any, Any, Any]:
        """The link's query, what it leaves out, and the request as code."""
        asked = self.controls.asked(request, values)
        if asked is None:
            return gr.skip(), gr.skip(), gr.skip()
        what, form, url = asked.rest
        code = snippet(asked.view, what, form, url, asked.model, needs_key=bool(asked.key))
        note = _leaves_out(left_out(asked.view))
        return to_link(asked.view), note, gr.update(value=code, language=FORMS[form][0])

    async def make(self, name: str, request: gr.Request, *values: Any) -> Any:
        """A file with what the page shows."""
        asked = self.controls.asked(request, values)
        if asked is None:
            return gr.skip()
        curve: Curve = asked.rest[0]
        panes: Panes | None = asked.rest[1]
        if (panes is None) if name == ANSWERS_CSV else not curve.lines:
            raise gr.Error("There is nothing to download yet.")
        if name == ANSWERS_CSV:
            assert panes is not None
            return as_file("answers.csv", "text/csv", answers_csv(panes).encode())
        if name == CURVE_CSV:
            return as_file("curve.csv", "text/csv", curve_csv(curve).encode())
        png = await asyncio.to_thread(curve_png, curve, asked.view.alphas.get(curve.view.held))
        return as_file("curve.png", "image/png", png)


def _leaves_out(names: list[str]) -> str:
    if not names:
        return ""
    return draw_refusal(f"The link is without {' and '.join(names)}, which would make it too long to be opened.")
