"""The page: dials above, tabs below, mounted on a FastAPI app as a client of an ipissa server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import gradio as gr
from fastapi import FastAPI

from .client import Client, ServerError
from .controls import Controls
from .gradio_routes import OnlyCalledRoutes
from .panes import draw_refusal
from .tabs.adapters import AdapterTab
from .tabs.chat import ChatTab
from .tabs.compare import CompareTab
from .tabs.share import ShareTab
from .tabs.where import WhereTab
from .view import LINK_PARAMETER, View, cut, from_link

TITLE = "ipissa · steer a language model from the inside"
INTRODUCTION = (
    "# ipissa\nDrag a dial: the same model, steered from the inside by one number. At 0 it is the base model."
)
FOLDER = Path(__file__).parent


def mount_page(app: FastAPI, client: Client) -> FastAPI:
    """Serve the page at `/` of `app`, as a client of a server; the client is closed with the app."""
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def closing(app: FastAPI) -> AsyncIterator[Any]:
        try:
            async with lifespan(app) as state:
                yield state
        finally:
            await client.close()

    app.router.lifespan_context = closing
    app.add_middleware(OnlyCalledRoutes)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        app,
        build_page(client),
        path="/",
        css=(FOLDER / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(FOLDER / 'page.js').read_text(encoding='utf-8')}</script>",
        theme=theme,
        ssr_mode=False,
        run_history=False,
        max_file_size="1b",  # nothing is uploaded
        footer_links=[],
    )


def build_page(client: Client) -> gr.Blocks:
    """The layout, and which function answers which event."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        controls = Controls(client)
        gr.Markdown(INTRODUCTION)
        status = gr.HTML(visible=False, elem_id="status", apply_default_css=False)
        controls.key.render()
        controls.adapters.render()
        controls.url.render()
        controls.dial.render()
        with gr.Tab("Compare", elem_id="tab-compare"):
            compare = CompareTab(controls)
        with gr.Tab("Where it acts", elem_id="tab-where"):
            where = WhereTab(controls, compare.panes)
        with gr.Tab("Chat", elem_id="tab-chat"):
            chat = ChatTab(controls)
        with gr.Tab("Adapters", elem_id="tab-adapters"):
            adapters = AdapterTab(controls)
        with gr.Tab("Keep and share", elem_id="tab-share"):
            share = ShareTab(controls, compare.panes, compare.curve)
        for tab in (share, compare, where, chat, adapters):  # the link does not wait for what follows it
            tab.listen()
        _open(page, controls, status, compare, adapters, share)
    return page


def _open(
    page: gr.Blocks, c: Controls, status: gr.HTML, compare: CompareTab, adapters: AdapterTab, share: ShareTab
) -> None:
    """What happens when the page opens, and again when a key is given."""
    address = gr.Textbox(visible="hidden")
    found = [status, c.key, c.adapters, c.url, adapters.name, *c.settings]
    opened = gr.on(
        [page.load, c.key.submit], _restore(c), [c.key, address], found, js="(key) => ipissa.opened(key)", **c.quick
    )
    # The browser looks only now and then, and may not have seen the server missing.
    opened.failure(None, None, None, js="ipissa.missed")
    opened.success(None, None, None, js="ipissa.found")
    # The present choice first, which is quick, then the whole curve.
    scored = opened.success(compare.score, [*c.inputs, compare.curve], [compare.bars, compare.drawing], **c.quick)
    scored.then(compare.measure, [*c.inputs, compare.curve], compare.measured, **c.slow)
    opened.success(compare.write, c.inputs, [compare.answers, compare.panes], **c.slow)
    opened.success(share.describe, share.inputs, share.described, **c.quick)
    page.unload(c.leave)
    c.key.submit(None, c.key, None, js="ipissa.keepKey")


def _restore(controls: Controls) -> Callable[..., Any]:
    async def restore(request: gr.Request, key: str, address: str) -> list[Any]:
        """The view of the link in the address, over the adapters the server has loaded."""
        controls.leave(request)  # moves of the dials are counted from 0 again
        unknown = [gr.skip()] * (3 + len(controls.settings))
        try:
            adapters = await controls.client.adapters(key)
        except ServerError as error:
            if error.status in (502, 503):  # the browser says so, and opens the page again when it is over
                raise gr.Error(str(error), visible=False, print_exception=False) from error
            needs_key = gr.update(visible=True) if error.status == 401 else gr.skip()
            return [gr.update(value=draw_refusal(str(error)), visible=True), needs_key, *unknown]
        if not adapters:
            note = "The server has no adapter loaded, so there is nothing to steer; start it with --adapter."
            return [gr.update(value=draw_refusal(note), visible=True), gr.skip(), *unknown]
        view, note = _view_of(address)
        names = [each["id"] for each in adapters]
        lost = [name for name, alpha in {**view.other, **view.alphas}.items() if alpha and name not in names]
        if lost:
            named = cut(", ".join(lost), 100)
            note = f"The link turns {named}, which this server has not loaded; the rest is restored."
        return [
            gr.update(value=draw_refusal(note) if note else "", visible=bool(note)),
            key,
            adapters,
            _page_of(address) if controls.client.has_page else gr.skip(),
            gr.update(choices=names, value=names[0]),
            *controls.restored(view, adapters),
        ]

    return restore


def _page_of(address: str) -> str:
    """Where the browser found the page: behind a proxy, or from another machine, not where this process does."""
    page = urlsplit(address)
    return f"{page.scheme}://{page.netloc}{page.path.rstrip('/')}"


def _view_of(address: str) -> tuple[View, str]:
    """The view that an address restores, and what is to be said about it."""
    packed = parse_qs(urlsplit(address).query).get(LINK_PARAMETER)
    if not packed:
        return View(), ""
    try:
        return from_link(packed[0]), ""
    except ValueError as error:
        return View(), str(error)
