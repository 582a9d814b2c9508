"""Where it acts: a text read under both settings."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..client import ServerError
from ..controls import Asked, Controls
from ..heatmap import draw_heatmap
from ..panes import Panes, draw_refusal
from ..tokens import Answer, pieces_of
from ..turns import unless
from ..view import Steer

EXAMPLE = "I had a lovely morning, but to be honest my neighbours are the worst people I know."
HELP = (
    "The same text, read at both settings of the first tab: colours show which setting finds a token likelier. "
    "It is read as the model's answer to the prompt, or on its own."
)


class WhereTab:
    """Layout and handlers."""

    def __init__(self, controls: Controls, panes: gr.State) -> None:
        self.controls, self.panes = controls, panes
        gr.Markdown(HELP)
        self.text = gr.Textbox(EXAMPLE, label="Text", lines=4, elem_id="heat-text")
        self.answers_prompt = gr.Checkbox(True, label="Read it as the answer to the prompt")
        with gr.Row():
            self.read = gr.Button("Read", size="md", variant="primary", elem_id="heat-read")
            self.take_left = gr.Button("Take the left answer", size="md")
            self.take_right = gr.Button("Take the right answer", size="md")
        self.drawn = gr.HTML(elem_id="heat", apply_default_css=False)

    def listen(self) -> None:
        """A button reads; the answers of the first tab can be taken over."""
        c = self.controls
        inputs = [*c.inputs, self.text, self.answers_prompt]
        gr.on([self.read.click, self.text.submit], self.compare, inputs, self.drawn, **c.quick)
        for side, button in enumerate((self.take_left, self.take_right)):
            taken = button.click(_answer_of(side), self.panes, self.text, **c.quick)
            taken.then(self.compare, inputs, self.drawn, **c.quick)

    async def compare(self, request: gr.Request, *values: Any) -> Any:
        """The text's tokens under both settings, in one request."""
        asked = self.controls.asked(request, values)
        if asked is None:
            return gr.skip()
        async with self.controls.readings.take(asked.user) as overtaken:
            try:
                read = await unless(overtaken, self._read(asked))
            except ServerError as error:
                return draw_refusal(str(error))
        return gr.skip() if read is None else draw_heatmap(*read)

    async def _read(self, asked: Asked) -> tuple[Answer, Steer, Steer]:
        """What is drawn."""
        client, (text, answers_prompt) = self.controls.client, asked.rest
        start: list[int] = []
        if answers_prompt:
            start = await client.tokenize(asked.key, messages=[{"role": "user", "content": asked.view.prompt}])
        ids = await client.tokenize(asked.key, prompt=text, add_special_tokens=not start)
        if not ids:
            raise ServerError("Write a text to read.")
        ((left, right),), applied = await client.read(asked.key, [[*start, *ids]], [asked.view.left, asked.view.right])
        shown = [(token, token_id, value) for (token, value), token_id in zip(left[len(start) :], ids, strict=True)]
        return pieces_of(text, shown).against([value for _, value in right[len(start) :]]), applied[0], applied[1]


def _answer_of(side: int) -> Any:
    def take(panes: Panes | None) -> Any:
        return panes.answers[side].text if panes else gr.skip()

    return take
