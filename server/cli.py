"""`ipissa-serve`: serve a model and its adapters."""

from __future__ import annotations

import asyncio
import logging
import socket
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from ipissa.adapter import load_adapter
from ipissa.adapter.named import named_adapters
from ipissa.cli_errors import assignments, run_cli
from ipissa.errors import ConfigError
from ipissa.models import DEMO_MODEL

from .app import create_app
from .settings import DEFAULT_MAX_ALPHA, Settings
from .threads import in_passing_thread

SHUTDOWN_SECONDS = 2
command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@command.command(context_settings={"auto_envvar_prefix": "IPISSA", "help_option_names": ["-h", "--help"]})
def serve(
    model: Annotated[
        str | None, typer.Option(help="Demo model name, hub id, folder or GGUF file. Default: the adapter's base.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="PATH or NAME=PATH of an adapter; repeat for several.")
    ] = None,
    engine: Annotated[str, typer.Option(help="What runs the model: torch or vllm.")] = "torch",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Bearer token that requests must carry.")] = None,
    adapter_dir: Annotated[
        Path | None, typer.Option(help="Folder that adapters may be loaded from at run time.")
    ] = None,
    ui: Annotated[bool, typer.Option(help="Serve the page at /.")] = True,
    alpha_bucket: Annotated[
        float | None, typer.Option(help="Round α to a multiple of this; 0 is exact. Default: 0.001, vllm 0.05.")
    ] = None,
    max_alpha: Annotated[float, typer.Option(help="Refuse requests beyond this |α|.")] = DEFAULT_MAX_ALPHA,
    default_alpha: Annotated[float, typer.Option(help="α of requests that give none.")] = 0.0,
    max_batch: Annotated[int, typer.Option(help="Most sequences decoding at a time.")] = 64,
    max_queue: Annotated[int, typer.Option(help="Most requests waiting or running.")] = 128,
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and answer together.")] = None,
    max_cache_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens kept in memory: sequences times the longest of them. Default: 65536 (vllm: on CPUs)."
        ),
    ] = None,
    max_loras: Annotated[int | None, typer.Option(help="vllm: most different settings in one batch.", min=1)] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(help="vllm: devices that share every layer.")] = None,
    data_parallel_size: Annotated[int | None, typer.Option(help="vllm: copies of the model.")] = None,
    distributed_executor_backend: Annotated[str | None, typer.Option(help="vllm: mp or ray.")] = None,
    vllm: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of any other engine argument of vLLM's; repeat for several.")
    ] = None,
) -> None:
    """Serve a model with steering adapters: an OpenAI-compatible API, and a page with a slider.

    Without arguments: the demo model with every adapter that ships with ipissa.
    """
    adapters = named_adapters(adapter) if adapter else ({} if model else shipped_adapters())
    passed_on = {
        "max_loras": max_loras,
        "tensor_parallel_size": tensor_parallel_size,
        "data_parallel_size": data_parallel_size,
        "distributed_executor_backend": distributed_executor_backend,
    }
    given = {name: value for name, value in passed_on.items() if value is not None}
    settings = Settings(
        model=model or base_of(adapters),
        adapters=adapters,
        engine=engine,
        device=device,
        dtype=dtype,
        host=host,
        port=port,
        api_key=api_key,
        adapter_dir=adapter_dir,
        ui=ui,
        alpha_bucket=alpha_bucket,
        max_alpha=max_alpha,
        default_alpha=default_alpha,
        max_batch=max_batch,
        max_queue=max_queue,
        max_model_len=max_model_len,
        max_cache_tokens=max_cache_tokens,
        vllm={**given, **assignments("--vllm", vllm or [])},
    )
    run(settings)


def shipped_adapters() -> dict[str, Path]:
    """The adapters that come with ipissa."""
    folder = Path(str(files("ipissa_adapters")))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def base_of(adapters: dict[str, Path]) -> str:
    """The base model the adapters name, which must be one; the demo model without adapters."""
    bases = {in_passing_thread(load_adapter, path).base_model["name"] for path in adapters.values()}
    if len(bases) > 1:
        raise ConfigError(f"The adapters were made for different base models ({', '.join(sorted(bases))}); serve one.")
    return bases.pop() if bases else DEMO_MODEL


def run(settings: Settings) -> None:
    """Serve until stopped.

    Raises:
        IpissaError: an adapter file is unusable, or the engine cannot be loaded.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s:     %(message)s")
    logging.getLogger("ipissa").setLevel(logging.INFO)
    logging.getLogger("ipissa_server").setLevel(logging.INFO)
    failure: list[Exception] = []

    def stop(error: Exception) -> None:
        failure.append(error)
        server.should_exit = True

    app = create_app(settings, on_load_error=stop)
    # Open pages hold a connection for as long as they are open; do not wait for people to close them.
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, log_level="info", timeout_graceful_shutdown=2 * SHUTDOWN_SECONDS
    )
    server = _Server(config)
    server.run()
    if failure:
        raise failure[0]


class _Server(uvicorn.Server):
    """Ends requests that outlast a shutdown with an error of the API, before uvicorn would cut them off."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_requests())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_requests(self) -> None:
        await asyncio.sleep(SHUTDOWN_SECONDS)
        engine = self.config.app.state.engine  # type: ignore[union-attr]
        if engine is not None:  # it may be loading yet
            await asyncio.to_thread(engine.close)


def main(args: list[str] | None = None) -> None:
    """Entry point of `ipissa-serve`."""
    run_cli(command, args)
