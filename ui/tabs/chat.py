"""Several turns, each at the α of its moment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ..chat import Conversation, Turn, answered, messages_of, transcript
from ..client import ServerError
from ..controls import Controls
from ..tokens import Answer
from ..turns import until


class ChatTab:
    """Layout and handlers."""

    def __init__(self, controls: Controls) -> None:
        self.controls = controls
        self.conversation = gr.State(Conversation())
        gr.Markdown("Turn the dial between two turns: every answer says at which α it was written.")
        self.shown = gr.Chatbot(
            label="Conversation",
            height=420,
            elem_id="chat",
            buttons=[],  # they would copy the escaped text
            render_markdown=False,
            latex_delimiters=[],
        )
        self.sent = gr.Textbox(visible="hidden", elem_id="chat-sent")
        self.refused = gr.Textbox(visible="hidden", elem_id="chat-refused")
        self.said = gr.Textbox(label="You", placeholder="Say something and press Enter", elem_id="chat-said")
        with gr.Row():
            self.send = gr.Button("Send", size="md", variant="primary", elem_id="chat-send")
            self.stop = gr.Button("Stop", size="md", elem_id="chat-stop")
            self.clear = gr.Button("Start over", size="md", elem_id="chat-clear")

    def listen(self) -> None:
        """Enter sends; Stop keeps what is there."""
        c = self.controls
        # What is sent leaves the box at once, so that it is sent only once; what is typed meanwhile stays there.
        sent = gr.on(
            [self.said.submit, self.send.click], None, self.said, [self.sent, self.said], js="(said) => [said, '']"
        )
        inputs = [*c.inputs, self.sent, self.conversation]
        ended = sent.then(self.answer, inputs, [self.shown, self.refused], **c.slow)
        ended.then(None, [self.said, self.refused], [self.said, self.refused], js="(said, back) => [said || back, '']")
        self.stop.click(self.halt, None, None, **c.quick)
        cleared = gr.on([self.clear.click, self.shown.clear], self.halt, None, None, **c.quick)
        cleared.then(_cleared, self.conversation, self.shown, **c.quick)

    async def answer(self, request: gr.Request, *values: Any) -> AsyncIterator[tuple[Any, Any]]:
        """The conversation with one turn more, answered at the dial's present position; and what was refused."""
        asked = self.controls.asked(request, values)
        if asked is None or not asked.rest[0].strip():
            return
        said, conversation = asked.rest
        async with self.controls.conversations.take(asked.user) as overtaken:
            turns = conversation.turns = [*conversation.turns, Turn(said.strip(), asked.view.left)]
            yield transcript(turns), ""
            answer, note, refused = Answer(), "", ""
            try:
                sampling = {**asked.sampling, "seed": asked.view.seed + len(turns)}
                growing = self.controls.client.chat(asked.key, messages_of(turns), [asked.view.left], **sampling)
                async for (answer,) in until(overtaken, growing):
                    turns = conversation.turns = answered(turns, answer)
                    yield transcript(turns), gr.skip()
                note = "stopped" if overtaken.is_set() else ""
            except ServerError as error:
                note = str(error)
                if not answer.text:  # so that it is no part of the conversation, and can be sent again
                    refused = said
            turns = conversation.turns = answered(turns, answer, note)
            yield transcript(turns), refused

    async def halt(self, request: gr.Request) -> None:
        """Overtake the answer that is being written."""
        async with self.controls.conversations.take(request.session_hash or ""):
            pass


def _cleared(conversation: Conversation) -> list[Any]:
    conversation.turns = []
    return []
