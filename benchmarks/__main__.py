"""Print every table in Markdown."""

from __future__ import annotations

from typing import Annotated

import typer

from .decode import decode_table
from .engine import engine_table
from .evaluation import evaluation_table
from .timing import HEADER, machine
from .training import training_table


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="model, trainer, evaluation or engine; may be given again. Default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the engine's figures.")] = 5,
    decode_rounds: Annotated[int, typer.Option(help="Rounds of the model's own figures.")] = 21,
    decode_dtype: Annotated[str, typer.Option(help="Of the model's own figures and the trainer's.")] = "float32",
    training_rounds: Annotated[int, typer.Option(help="Rounds of the trainer's figures.")] = 7,
    evaluation_rounds: Annotated[int, typer.Option(help="Rounds of the evaluation's figures.")] = 3,
    evaluation_dtype: Annotated[str, typer.Option(help="Of the evaluation's figures.")] = "bfloat16",
    engine_dtype: Annotated[str, typer.Option(help="Of the engine's figures.")] = "bfloat16",
    peer: Annotated[
        list[str] | None, typer.Option(help="NAME=URL or NAME:MODEL=URL of another server of the same model.")
    ] = None,
) -> None:
    """Measure; machines are noisy, so every figure is a ratio within one run."""
    peers = dict(each.split("=", 1) for each in peer or [])
    tables = {
        "model": (decode_dtype, decode_table(decode_dtype, decode_rounds)),
        "trainer": (decode_dtype, training_table(decode_dtype, training_rounds)),
        "evaluation": (evaluation_dtype, evaluation_table(evaluation_dtype, evaluation_rounds)),
        "engine": (engine_dtype, engine_table(engine_dtype, rounds, peers)),
    }
    for name in only or tables:
        if name not in tables:
            raise typer.BadParameter(f"{name!r} is unknown; use {', '.join(tables)}.", param_hint="--only")
    for name in only or tables:
        dtype, ratios = tables[name]
        typer.echo(f"\n## In the {name} ({machine(dtype)})\n\n{HEADER}")
        for ratio in ratios:
            typer.echo(ratio.row())


if __name__ == "__main__":
    typer.run(main)
