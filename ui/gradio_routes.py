"""Which of Gradio's own routes the page answers: those its scripts call.

The others upload files, fetch addresses for whoever asks, or serve what a page without files never needs,
and the server's API key does not guard them.
"""

from __future__ import annotations

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

GRADIO, MONITORING = "/gradio_api/", "/monitoring"
CALLED = {"app_id", "cancel", "heartbeat", "info", "queue", "reset", "run", "startup-events", "theme.css"}


def is_called(path: str) -> bool:
    """Whether the page calls a path, or it is none of Gradio's."""
    _, gradio, rest = path.partition(GRADIO)
    return rest.split("/")[0] in CALLED if gradio else not path.startswith(MONITORING)


class OnlyCalledRoutes:
    """ASGI middleware that answers 404 for the routes of Gradio that the page does not call."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and not is_called(scope["path"]):
            await PlainTextResponse("Not found.", status_code=404)(scope, receive, send)
        else:
            await self.app(scope, receive, send)
