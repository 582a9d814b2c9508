"""`ipissa-ui`: the page on its own, as a client of a server anywhere."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

import typer
import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from .client import Client
from .page import mount_page

command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@command.command(context_settings={"auto_envvar_prefix": "IPISSA_UI", "help_option_names": ["-h", "--help"]})
def serve(
    server: Annotated[str, typer.Option(help="Address of the ipissa server.")] = "http://127.0.0.1:8000",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 7860,
) -> None:
    """Show the page of an ipissa server that runs elsewhere, with or without a page of its own."""
    address = urlsplit(server)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise typer.BadParameter(f"{server!r} is not an address; use for example http://127.0.0.1:8000.")
    uvicorn.run(standalone_app(server), host=host, port=port, timeout_graceful_shutdown=2)


def standalone_app(server: str) -> FastAPI:
    """The page, and `/health`, by which it sees how its server is."""
    app = FastAPI(title="ipissa-ui", docs_url=None, redoc_url=None, openapi_url=None)
    client = Client(server)

    @app.get("/health")
    async def health() -> Response:
        wrong = await client.health()
        if wrong is None:
            return Response()
        return JSONResponse({"error": {"message": str(wrong), "code": wrong.code}}, status_code=wrong.status or 502)

    return mount_page(app, client)


def main(args: list[str] | None = None) -> None:
    """Entry point of `ipissa-ui`."""
    command(args)
