"""What steering costs: decode speed and time to first token, as ratios within one run.

    python -m benchmarks.decode [--adapter FILE] [--rows 16] [--steps 4] [--rounds 25]

Machines are noisy, so the settings to compare take turns in short rounds, and each figure is the
median over rounds of the ratio within a round.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache

import ipissa

ADAPTER = Path(__file__).parents[1] / "adapters" / "kind.safetensors"
PROMPT = "Tell me about your day, from the first thing in the morning to the last thing at night."


class Decoder:
    """Repeats the same decode steps: prefill once, and cut the cache back after every measurement."""

    def __init__(self, model: Any, ids: torch.Tensor, steps: int) -> None:
        self._model, self._steps = model, steps
        self._cache = DynamicCache(config=model.config)
        self._first = self._next(ids)

    @torch.no_grad()
    def _next(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self._model(input_ids=ids, past_key_values=self._cache, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)  # (rows, 1)

    def seconds(self) -> float:
        """Seconds for `steps` greedy decode steps of the whole batch."""
        started, token = time.perf_counter(), self._first
        for _ in range(self._steps):
            token = self._next(token)
        _ = token.tolist()  # waits for the device
        elapsed = time.perf_counter() - started
        self._cache.crop(-self._steps)
        return elapsed


def first_token_seconds(steered: ipissa.SteeredModel, ids: torch.Tensor, alpha: float) -> float:
    """Seconds from setting α to the first token of one row."""
    started = time.perf_counter()
    with steered.alpha(alpha), torch.no_grad():
        steered.model(input_ids=ids[:1], logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
    return time.perf_counter() - started


def ratios(over: Callable[[], float], under: Callable[[], float], rounds: int) -> list[float]:
    """under / over, once per round, the two taking turns in alternating order; one warm-up round."""
    found = []
    for i in range(rounds + 1):
        first, second = (over, under) if i % 2 else (under, over)
        a, b = first(), second()
        found.append(a / b if first is under else b / a)
    return found[1:]


def main(
    adapter: Annotated[Path, typer.Option(help="Adapter file.")] = ADAPTER,
    rows: Annotated[int, typer.Option(help="Rows in the batch.")] = 16,
    steps: Annotated[int, typer.Option(help="Decode steps per measurement.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds; every figure is their median.")] = 25,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "auto",
) -> None:
    """Print a Markdown table of ratios."""
    loaded = ipissa.load_adapter(adapter)
    model, tokenizer = ipissa.load_model(loaded.base_model["name"], dtype=dtype)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.to(model.device).expand(rows, -1)
    steered = ipissa.attach(model, loaded, cache_size=rounds + 64)
    spread = [-1 + 2 * (row + 0.5) / rows for row in range(rows)]

    decoder = Decoder(model, ids, steps)

    def at(alpha: Any) -> float:
        with steered.alpha(alpha):
            return decoder.seconds()

    unseen = iter(range(1, 10**6))
    table = {
        # More tokens per second is fewer seconds, so each ratio is seconds of the reference over ours.
        f"{rows} rows, {rows} α / unsteered, tokens per second": ratios(lambda: at(spread), lambda: at(0.0), rounds),
        f"{rows} rows, {rows} α / one α, tokens per second": ratios(lambda: at(spread), lambda: at(0.7), rounds),
        "unseen α / seen α, time to first token": ratios(
            lambda: first_token_seconds(steered, ids, 0.7),
            lambda: first_token_seconds(steered, ids, next(unseen) / 10**6),
            rounds,
        ),
    }
    typer.echo(
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{model.device}, {model.dtype}, {len(loaded.modules)} modules of rank {loaded.config.rank}\n"
    )
    typer.echo("| ratio | median | min | max |\n|-|-|-|-|")
    for name, values in table.items():
        typer.echo(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")


if __name__ == "__main__":
    typer.run(main)
