"""Several turns, each at the α of its moment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ..chat import Turn, answered, messages_of, transcript
from ..client import ServerError
from ..controls import Controls
from ..tokens import Answer
from ..turns import until


class ChatTab:
    """Layout and handlers."""

    def __init__(self, controls: Controls) -> None:
        self.controls = controls
        self.turns = gr.State([])
        gr.Markdown("Turn the dial between two turns: every answer says at which α it was written.")
        self.shown = gr.Chatbot(label="Conversation", height=420, elem_id="chat", buttons=["copy"])
        self.said = gr.Textbox(label="You", placeholder="Say something and press Enter", elem_id="chat-said")
        with gr.Row():
            self.send = gr.Button("Send", size="md", variant="primary", elem_id="chat-send")
            self.stop = gr.Button("Stop", size="md", elem_id="chat-stop")
            self.clear = gr.Button("Start over", size="md", elem_id="chat-clear")

    def listen(self) -> None:
        """Enter sends; Stop keeps what is there."""
        c = self.controls
        inputs = [*c.inputs, self.said, self.turns]
        gr.on([self.said.submit, self.send.click], self.answer, inputs, [self.shown, self.turns, self.said], **c.slow)
        self.stop.click(self.halt, None, None, **c.quick)
        cleared = self.clear.click(self.halt, None, None, **c.quick)
        cleared.then(lambda: ([], []), None, [self.shown, self.turns], **c.quick)

    async def answer(self, request: gr.Request, *values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
        """The conversation with one turn more, answered at the dial's present position."""
        asked = self.controls.asked(request, values)
        if asked is None or not asked.rest[0].strip():
            return
        said, turns = asked.rest
        turns = [*turns, Turn(said.strip(), asked.view.left)]
        async with self.controls.conversations.take(asked.user) as overtaken:
            yield transcript(turns), turns, ""
            answer, note, box = Answer(), "", gr.skip()
            try:
                sampling = {**asked.sampling, "seed": asked.view.seed + len(turns)}
                growing = self.controls.client.chat(asked.key, messages_of(turns), [asked.view.left], **sampling)
                async for (answer,) in until(overtaken, growing):
                    turns = answered(turns, answer)  # kept as it grows: who speaks next may not wait for its end
                    yield transcript(turns), turns, gr.skip()
                note = "stopped" if overtaken.is_set() else ""
            except ServerError as error:
                note = str(error)
                if not answer.text:  # so that it is no part of the conversation, and can be sent again
                    box = said
            turns = answered(turns, answer, note)
            yield transcript(turns), turns, box

    async def halt(self, request: gr.Request) -> None:
        """Overtake the answer that is being written."""
        async with self.controls.conversations.take(request.session_hash or ""):
            pass
