"""What the dial costs on vLLM: `make bench-vllm`, or `.venv-vllm/bin/python -m benchmarks.vllm --help`.

One engine at a time is measured while the other idles, by turns, as everywhere here. `slots` prints the memory that
docs/scaling.md works with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import typer
from ipissa_server.engine.vllm_options import layers_of
from transformers import AutoTokenizer

import ipissa
from ipissa.adapter.baking import Baker
from ipissa.adapter.lora_store import LoraStore
from ipissa.models import DEMO_MODEL, model_source

from . import ADAPTER, PROMPT
from .client import Server, serving, started
from .timing import HEADER, Ratio, machine, seconds, speed_ratios

ALPHA, TOKENS, STREAMS, FIRST_TOKEN = 0.75, 48, 16, 1000
BAKES = 20
# (layers, hidden, inner, queries, keys): the linear layers of a block follow from these.
BASES = {
    "4B": (36, 2560, 9728, 4096, 1024),
    "8B": (32, 4096, 14336, 4096, 1024),
    "70B": (80, 8192, 28672, 8192, 1024),
}
RANKS = (32, 64, 128, 256)
SHARE = 0.7  # of the blocks, that the shipped adapters change

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def speed(
    rounds: Annotated[int, typer.Option(help="Rounds of every figure.")] = 5,
    dtype: Annotated[str, typer.Option(help="Of the model, on both sides.")] = "bfloat16",
) -> None:
    """Ratios within one run, and the time of one baking."""
    typer.echo(f"## On vLLM ({machine(dtype)})\n\n{HEADER}")
    for ratio in speed_table(dtype, rounds):
        typer.echo(ratio.row())


@app.command()
def slots() -> None:
    """Memory of one LoRA slot in MB (10^6 bytes, bfloat16), by base and rank."""
    typer.echo("| base | layers that are adapted | " + " | ".join(f"r = {rank}" for rank in RANKS) + " |")
    typer.echo("|-|-|" + "-|" * len(RANKS))
    for base in BASES:
        for name, widths in (("o_proj and down_proj, 70 % of the blocks", two_of(base)), ("all linear", all_of(base))):
            sizes = " | ".join(f"{2 * rank * widths / 1e6:,.0f}" for rank in RANKS)
            typer.echo(f"| {base} | {name} | {sizes} |")


def two_of(base: str) -> int:
    """Σ (d_in + d_out) over what the shipped adapters change."""
    layers, hidden, inner, queries, _ = BASES[base]
    return round(SHARE * layers) * ((queries + hidden) + (inner + hidden))


def all_of(base: str) -> int:
    """Σ (d_in + d_out) over q, k, v, o, gate, up and down of every block."""
    layers, hidden, inner, queries, keys = BASES[base]
    return layers * (2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner))


def speed_table(dtype: str, rounds: int) -> Iterator[Ratio]:
    """All rows, as they are measured."""
    yield Ratio("baking one setting for SmolLM2, in units of 1 ms", _bakes(dtype), at_most=50)
    unread = iter(range(FIRST_TOKEN, 10**6))

    def streams(server: Server, **more: object) -> float:
        # Every stream has a text of its own, which none has read before.
        bodies = [{"prompt": [next(unread), *_prompt()], "max_tokens": TOKENS, **more} for _ in range(STREAMS)]
        return server.seconds_per_token(bodies)

    # Stock vLLM spends time on LoRAs in every layer, unless it is told which layers have one.
    told = ("--lora-target-modules", *layers_of(ipissa.load_adapter(ADAPTER).modules))
    for name, options in (("stock `vllm serve`", ()), ("stock `vllm serve` told the LoRA's layers", told)):
        with servers(dtype, *options) as (ours, stock):
            yield Ratio(
                f"{STREAMS} streams at one α over HTTP / {name} with the same LoRA",
                speed_ratios(partial(streams, ours, steer_alpha={"kind": ALPHA}), partial(streams, stock), rounds),
                at_least=0.95,
            )
            if options:
                yield _new_alpha(ours, unread, 4 * rounds)


def _new_alpha(ours: Server, unread: Iterator[int], rounds: int) -> Ratio:
    unseen = iter(range(1, 10**6))

    def first_token(alpha: float) -> float:
        body = {"prompt": [next(unread), *_prompt()], "max_tokens": 1, "steer_alpha": {"kind": alpha}}
        return ours.streams([body])[0].first_token_seconds

    known, new = partial(first_token, ALPHA), lambda: first_token(next(unseen) / 1000)
    return Ratio("a new α / a known one, time to first token", speed_ratios(known, new, rounds), at_most=2.0)


@contextmanager
def servers(dtype: str, *more: str) -> Iterator[tuple[Server, Server]]:
    """`ipissa-serve --engine vllm`, and stock vLLM with the adapter exported at one α and further options."""
    adapter = ipissa.load_adapter(ADAPTER)
    base = adapter.base_model["name"]
    with tempfile.TemporaryDirectory() as folder:
        lora = ipissa.to_lora(adapter, alpha=ALPHA, output_dir=Path(folder) / "lora")
        stock = ["vllm", "serve", model_source(base), "--dtype", dtype, "--enforce-eager", "--max-model-len", "2048"]
        stock += ["--enable-lora", "--max-lora-rank", str(adapter.config.rank), "--lora-modules", f"kind={lora}"]
        stock += ["--kv-cache-memory-bytes", str(2**31), *more]  # vLLM would take most of a CPU machine
        options = ("--engine", "vllm", "--alpha-bucket", "0.001", "--max-model-len", "2048")
        with serving(base, dtype, *options) as ours, started(stock, "kind") as peer:
            yield ours, peer


def _bakes(dtype: str) -> list[float]:
    store = LoraStore(Baker({"kind": ipissa.load_adapter(ADAPTER)}, dtype=dtype))
    return [1000 * seconds(partial(store.get, {"kind": i / 100})) for i in range(BAKES + 1, 0, -1)][1:]


@cache
def _prompt() -> list[int]:
    return AutoTokenizer.from_pretrained(model_source(DEMO_MODEL)).encode(PROMPT)


if __name__ == "__main__":
    app()
