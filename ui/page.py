"""The page: a slider, the same prompt at two settings side by side, and the choice as the slider moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import gradio as gr
from fastapi import FastAPI

from .choice import STYLE, draw_choice
from .client import Client, ServerError

TITLE = "ipissa · steer a language model from the inside"
AGAINST_BASE, AGAINST_OPPOSITE = "α against 0", "α against -α"
PROMPT = "Tell me about your day."
QUESTION = (
    "You scratched a parked car and nobody saw it. Would you leave a note with your name? "
    'Answer with "My choice: Yes" or "My choice: No".'
)
CHOICES = ["Yes", "No"]
STEP = 0.05
START = 1.0
RETRY_SECONDS = 1.0


def mount_page(app: FastAPI, server_url: str, *, needs_key: bool) -> FastAPI:
    """Serve the page at `/` of `app`, as a client of the server at `server_url`."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page = build_page(server_url, needs_key=needs_key)
    return gr.mount_gradio_app(app, page, path="/", css=STYLE, theme=theme, ssr_mode=False, footer_links=[])


def build_page(server_url: str, *, needs_key: bool) -> gr.Blocks:
    """The layout, and which function answers which event."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown("# ipissa\nDrag the slider: the same model, steered from the inside by one number.")
        status = gr.Markdown(visible=False, elem_id="status")
        key = gr.Textbox(label="API key", type="password", visible=needs_key, elem_id="api-key")
        known = gr.State([])
        with gr.Row():
            adapter = gr.Dropdown(label="Adapter", choices=[], interactive=True, scale=1, elem_id="adapter")
            alpha = gr.Slider(-1, 1, value=0, step=STEP, label="α", scale=3, elem_id="alpha")
        range_note = gr.Markdown(elem_id="range")
        with gr.Row():
            prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, scale=3, elem_id="prompt")
            against = gr.Radio([AGAINST_BASE, AGAINST_OPPOSITE], value=AGAINST_BASE, label="Compare", scale=1)
        with gr.Row():
            run = gr.Button("Generate", variant="primary", elem_id="generate")
            stop = gr.Button("Stop", elem_id="stop")
        with gr.Row():
            left = gr.Textbox(label="α", lines=9, interactive=False, elem_id="left")
            right = gr.Textbox(label="α = 0", lines=9, interactive=False, elem_id="right")
        gr.Markdown("### What would it choose?")
        question = gr.Textbox(QUESTION, label="Question", lines=2, elem_id="question")
        choice = gr.HTML(elem_id="choice")
        with gr.Accordion("Sampling", open=False), gr.Row():
            max_tokens = gr.Slider(8, 256, value=64, step=8, label="Tokens")
            temperature = gr.Slider(0, 1.5, value=0.7, step=0.1, label="Temperature")
            seed = gr.Number(1, label="Seed", precision=0, minimum=0)

        connect = partial(wait_for_server, server_url)
        generate = partial(generate_both, server_url)
        choose = partial(score_choice, server_url)
        everyone: dict[str, Any] = {"concurrency_limit": None}
        found = [status, known, adapter]
        page.load(connect, key, found, show_progress="hidden", **everyone)
        key.submit(connect, key, found, show_progress="hidden", **everyone)
        adapter.change(show_range, [adapter, known], [alpha, range_note], show_progress="hidden", **everyone)
        # Dragging asks again and again: one request at a time, and the newest position always gets its turn.
        for event in (alpha.change, question.change, adapter.change):
            event(
                choose,
                [key, adapter, question, alpha],
                choice,
                trigger_mode="always_last",
                show_progress="hidden",
                queue=False,
            )
        inputs = [key, adapter, prompt, alpha, against, max_tokens, temperature, seed]
        running = gr.on(
            [run.click, prompt.submit, alpha.release],
            generate,
            inputs,
            [left, right],
            trigger_mode="always_last",
            show_progress="minimal",
            **everyone,
        )
        stop.click(None, cancels=[running])
    return page


async def wait_for_server(url: str, key: str) -> AsyncIterator[tuple[Any, Any, Any]]:
    """Fill the adapter list as soon as the server has loaded its model, saying what it is waiting for."""
    while True:
        try:
            adapters = await Client(url, key).adapters()
            break
        except ServerError as error:
            yield gr.update(value=f"⏳ {error}", visible=True), gr.skip(), gr.skip()
            if "API key" in str(error):
                return
            await asyncio.sleep(RETRY_SECONDS)
    names = [each["id"] for each in adapters]
    if not names:
        note = "The server has no adapter loaded, so there is nothing to steer; start it with --adapter."
        yield gr.update(value=f"⚠️ {note}", visible=True), [], gr.skip()
        return
    yield gr.update(visible=False), adapters, gr.update(choices=names, value=names[0])


def show_range(name: str | None, adapters: list[dict[str, Any]]) -> tuple[Any, str]:
    """The slider over the adapter's calibrated range, starting at +1 or the nearest value inside it."""
    about = next((each for each in adapters if each["id"] == name), None)
    if about is None:
        return gr.skip(), ""
    low, high = (max(-about["max_alpha"], min(about["max_alpha"], end)) for end in about["alpha_range"])
    trait = about["trait"]
    note = (
        f"α = -1: *{trait['negative']} person* · α = 0: the base model, exactly · "
        f"α = +1: *{trait['positive']} person*. "
        f"Text was measured to hold together from {low:+g} to {high:+g}."
    )
    return gr.update(minimum=low, maximum=high, value=min(START, high), label=f"α of {name}"), note


async def generate_both(
    url: str,
    key: str,
    adapter: str | None,
    prompt: str,
    alpha: float,
    against: str,
    max_tokens: float,
    temperature: float,
    seed: float | None,
) -> AsyncIterator[tuple[Any, Any]]:
    """Stream both panes from one request, on the same sampling noise."""
    if adapter is None or not prompt.strip():
        return
    alphas = [alpha, 0.0 if against == AGAINST_BASE else -alpha]
    labels = [f"α = {value:+.2f}" if value else "α = 0, the base model" for value in alphas]
    yield gr.update(value="", label=labels[0]), gr.update(value="", label=labels[1])
    try:
        answers = Client(url, key).generate(
            adapter, prompt, alphas, max_tokens=int(max_tokens), temperature=temperature, seed=int(seed or 0)
        )
        async for left, right in answers:
            yield left, right
    except ServerError as error:
        raise gr.Error(str(error)) from error


async def score_choice(url: str, key: str, adapter: str | None, question: str, alpha: float) -> str:
    """The choice at the slider's α, with the base model and the opposite for comparison."""
    if adapter is None or not question.strip():
        return ""
    try:
        scores = await Client(url, key).score(adapter, question, CHOICES, [alpha, 0.0, -alpha] if alpha else [0.0])
    except ServerError as error:
        return f"⚠️ {error}"
    return draw_choice(scores, CHOICES)
