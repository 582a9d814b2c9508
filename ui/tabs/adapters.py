"""The adapters that are loaded: facts, figures, card and training run."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..adapters import describe_adapter, history_frame, layers_frame
from ..client import ServerError
from ..controls import FORGOTTEN, Adapters, Controls


class AdapterTab:
    """Layout and handlers."""

    def __init__(self, controls: Controls) -> None:
        self.controls = controls
        self.name = gr.Dropdown([], label="Adapter", interactive=True, elem_id="adapter")
        self.facts = gr.Markdown(elem_id="adapter-facts")
        with gr.Accordion("Card", open=False):
            self.card = gr.Markdown(elem_id="adapter-card")
        with gr.Accordion("Training run", open=True, visible=False, elem_id="adapter-run") as self.run:
            self.history = gr.LinePlot(x="step", y="value", color="figure", title="Figures by step", height=260)
            self.samples = gr.Markdown()
            self.layers = gr.Dataframe(label="What changed per layer", interactive=False, max_height=300)

    def listen(self) -> None:
        """Choosing an adapter shows it."""
        c = self.controls
        shown = [self.facts, self.card, self.run, self.history, self.samples, self.layers]
        self.name.change(self.show, [c.key, c.adapters, self.name], shown, **c.quick)

    async def show(self, key: str, adapters: Adapters, name: str | None) -> Any:
        """Everything the server tells about an adapter."""
        if name and not adapters:
            raise gr.Error(FORGOTTEN, print_exception=False)
        about = next((each for each in adapters if each["id"] == name), None)
        if about is None:
            return [gr.skip()] * 6
        facts, card = describe_adapter(about), about["card"] or "There is no card beside its file."
        if not about["has_run"]:
            return facts, card, gr.update(visible=False), gr.skip(), gr.skip(), gr.skip()
        try:
            run = await self.controls.client.training_run(key, about["id"])
        except ServerError as error:
            return f"{facts}\n\n⚠️ {error}", card, gr.update(visible=False), gr.skip(), gr.skip(), gr.skip()
        return facts, card, gr.update(visible=True), history_frame(run), run["samples"], layers_frame(run)
