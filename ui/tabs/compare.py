"""The first tab: two answers side by side, and the choice as the dial moves."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ..choice import draw_choice
from ..client import Score, ServerError
from ..controls import Asked, Controls
from ..curve import Curve, Line, curve_key, draw_curve, sweep
from ..panes import Panes, draw_panes, draw_refusal
from ..presets import PRESETS
from ..turns import unless, until
from ..view import OTHER, describe


class CompareTab:
    """Layout and handlers; `panes` and `curve` are what other tabs may read."""

    def __init__(self, controls: Controls) -> None:
        self.controls = controls
        self.panes = gr.State(None)
        self.curve = gr.State(Curve())
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                self._answers()
            with gr.Column(scale=5, min_width=320):
                self._choice()

    def _answers(self) -> None:
        controls = self.controls
        with gr.Row():
            controls.prompt.render()
            self.preset = gr.Dropdown(list(PRESETS), value=None, label="Preset", min_width=140, elem_id="preset")
        controls.compare.render()
        controls.other.render()
        with gr.Row():
            self.run = gr.Button("Write", variant="primary", size="md", min_width=120, elem_id="write")
            self.stop = gr.Button("Stop", size="md", min_width=120, elem_id="stop")
        self.answers = gr.HTML(elem_id="answers", apply_default_css=False)
        with gr.Accordion("Sampling", open=False), gr.Row():
            controls.max_tokens.render()
            controls.temperature.render()
            controls.seed.render()

    def _choice(self) -> None:
        controls = self.controls
        controls.question.render()
        with gr.Row():
            controls.prefix.render()
            controls.choices.render()
        self.bars = gr.HTML(elem_id="choice", apply_default_css=False)
        self.drawing = gr.HTML(elem_id="curve", apply_default_css=False)
        self.note = gr.HTML(elem_id="curve-note", apply_default_css=False)

    def listen(self) -> None:
        """Cheap things follow the drag, expensive ones the release; a newer one always takes over."""
        c = self.controls
        inputs = [*c.inputs, self.curve]
        c.dial.input(self.score, inputs, [self.bars, self.drawing], trigger_mode="always_last", **c.quick)
        asked = [c.question.change, c.prefix.change, c.choices.change]
        gr.on(asked, self.measure, inputs, self.measured, **c.slow)
        # Gradio runs the listeners of one event one after another, each to the end of its stream, but those
        # of `then` at once; answers and curve wait for nothing but the dial.
        rested = c.dial.release(None, None, None, js="() => {}")
        rested.then(self.measure, inputs, self.measured, **c.slow)
        rested.then(self.write, c.inputs, [self.answers, self.panes], **c.slow)
        c.compare.change(lambda compare: gr.update(visible=compare == OTHER), c.compare, c.other, **c.quick)
        wanted = [self.run.click, c.prompt.submit, c.other.release, c.compare.input]
        gr.on(wanted, self.write, c.inputs, [self.answers, self.panes], **c.slow)
        self.stop.click(self.halt, None, None, **c.quick)
        chosen = self.preset.input(PRESETS.get, self.preset, [c.prompt, c.question], **c.quick)
        chosen.then(self.write, c.inputs, [self.answers, self.panes], **c.slow)

    @property
    def measured(self) -> list[Any]:
        """What `measure` writes."""
        return [self.bars, self.drawing, self.note, self.curve]

    async def score(self, request: gr.Request, *values: Any) -> tuple[Any, Any]:
        """The choice at the dial's position, while it moves: one setting, so that it is as quick as can be."""
        asked = self.controls.asked(request, values)
        if asked is None:
            return gr.skip(), gr.skip()
        async with self.controls.scores.take(asked.user, asked.passing) as overtaken:
            if overtaken.is_set():
                return gr.skip(), gr.skip()
            try:
                (score,) = await self._scores(asked, [asked.view.left])
            except ServerError as error:
                return draw_refusal(str(error)), gr.skip()
        return self._drawn(asked, asked.rest[0], score)

    async def measure(self, request: gr.Request, *values: Any) -> AsyncIterator[tuple[Any, Any, Any, Any]]:
        """The choice, and the curves that are not known yet, the held dial's first; gives way to a moving dial.

        One turn holds for all of them, so that whatever is asked next, also between two curves, ends this one.
        """
        asked = self.controls.asked(request, values)
        if asked is None:
            return
        async with self.controls.scores.take(asked.user, asked.moved) as overtaken:
            if overtaken.is_set():
                return
            key, curve, note = curve_key(asked.view, asked.dials), asked.rest[0], ""
            if curve.key != key:
                yield gr.skip(), draw_curve(curve, None), "", gr.skip()  # it answers an earlier question
                curve = Curve(key=key, view=asked.view)
            names = deque(_to_measure(asked, curve))
            while names:
                name = names.popleft()
                try:
                    measured = await unless(overtaken, self._measured(asked, curve, name))
                except ServerError as error:
                    if name is None or not curve.lines:  # the held dial's is refused, and with it the choice
                        yield draw_refusal(str(error)), gr.skip(), "", gr.skip()
                        return
                    note += draw_refusal(f"No curve of {name}: {error}")
                    yield gr.skip(), gr.skip(), note, gr.skip()
                    if error.status == 404:  # it was unloaded; the others may be there
                        continue
                    return
                if measured is None:
                    return
                present, grown = measured
                if not curve.fits(present):  # an adapter was replaced meanwhile: all over again
                    curve, note = Curve(key=key, view=asked.view), ""
                    names = deque(_to_measure(asked, curve))
                    continue
                curve = grown
                yield (*self._drawn(asked, curve, present), note, curve)

    async def _measured(self, asked: Asked, curve: Curve, name: str | None) -> tuple[Score, Curve]:
        """The present choice, and the curve with an adapter's line if one is named."""
        view = asked.view
        if name is None:
            (present,) = await self._scores(asked, [view.left])
            return present, curve
        (dial,) = (each for each in asked.dials if each["name"] == name)
        alphas = sweep(dial["low"], dial["high"])
        settings = [view.at(alpha) if name == view.held else {name: alpha} for alpha in alphas]
        present, base, *line = await self._scores(asked, [view.left, view.base, *settings])
        return present, curve.add(base, Line(name, tuple(score.steer[name] for score in line), tuple(line)))

    async def _scores(self, asked: Asked, settings: list[Any]) -> list[Score]:
        view = asked.view
        if not view.question.strip() or len(view.choice_list) < 2:
            raise ServerError("Write a question and at least two choices, separated by a comma.")
        return await self.controls.client.score(asked.key, view.question, view.prefix, view.choice_list, settings)

    def _drawn(self, asked: Asked, curve: Curve, score: Score) -> tuple[Any, Any]:
        """The bars and the curve with the present point."""
        view = asked.view
        current = curve.key == curve_key(view, asked.dials) and curve.fits(score)
        bars = [("α = " + describe(score.steer), score)]
        if current and curve.base and any(score.steer.values()):
            bars.append(("α = " + describe({}), curve.base))
        point = (score.steer[view.held], score) if current else None
        return draw_choice(bars, view.choice_list), draw_curve(curve, point)

    async def write(self, request: gr.Request, *values: Any) -> AsyncIterator[tuple[Any, Any]]:
        """Both answers, streamed from one request; then the log-probability of each token under the other setting."""
        asked = self.controls.asked(request, values)
        if asked is None:
            return
        view, client = asked.view, self.controls.client
        panes = Panes(view.prompt, (view.left, view.right))
        if not view.prompt.strip():
            yield draw_panes(_ended(panes, "Write a prompt.")), None
            return
        messages = [{"role": "user", "content": view.prompt}]
        async with self.controls.generations.take(asked.user, asked.moved) as overtaken:
            if overtaken.is_set():
                return
            yield draw_panes(panes), gr.skip()
            try:
                growing = client.chat(asked.key, messages, panes.settings, **asked.sampling)
                async for left, right in until(overtaken, growing):
                    panes = Panes(view.prompt, panes.settings, (left, right))
                    yield draw_panes(panes), gr.skip()
                if not overtaken.is_set():
                    panes = await unless(overtaken, self._read(asked, panes)) or panes
                panes = _ended(panes, "")
            except ServerError as error:
                panes = _ended(panes, str(error))
            yield draw_panes(panes), panes

    async def _read(self, asked: Asked, panes: Panes) -> Panes:
        """The panes with every token's log-probability under the other setting; one row at a time, as servers take."""
        client, (left, right) = self.controls.client, panes.answers
        start = await client.tokenize(asked.key, messages=[{"role": "user", "content": panes.prompt}])
        crossed = []
        for answer, other in zip((left, right), reversed(panes.settings), strict=True):
            ((read,),), _ = await client.read(asked.key, [[*start, *answer.ids]], [other])
            crossed.append(answer.against([value for _, value in read[len(start) :]]))
        return Panes(panes.prompt, panes.settings, (crossed[0], crossed[1]))

    async def halt(self, request: gr.Request) -> None:
        """Overtake whatever the user has running, by nothing; that closes the stream, which frees the engine."""
        async with self.controls.generations.take(request.session_hash or ""):
            pass


def _to_measure(asked: Asked, curve: Curve) -> list[str | None]:
    """The adapters whose curves are still to be measured, the held one first; where there is none, no adapter."""
    drawn = {line.name for line in curve.lines}
    names = dict.fromkeys((asked.view.held, *(each["name"] for each in asked.dials)))
    return [name for name in names if name not in drawn] or [None]


def _ended(panes: Panes, note: str) -> Panes:
    return Panes(panes.prompt, panes.settings, panes.answers, finished=True, note=note)
