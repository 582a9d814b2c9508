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
    rounds: Annotated[int, typer.Option(help="Rounds of the engine's figures.")] = 5,
    decode_rounds: Annotated[int, typer.Option(help="Rounds of the model's own figures.")] = 21,
    decode_dtype: Annotated[str, typer.Option(help="Of the model's own figures and the trainer's.")] = "float32",
    training_rounds: Annotated[int, typer.Option(help="Rounds of the trainer's figures.")] = 7,
    evaluation_rounds: Annotated[int, typer.Option(help="Rounds of the evaluation's figures.")] = 3,
    engine_dtype: Annotated[str, typer.Option(help="Of the engine's figures.")] = "bfloat16",
    peer: Annotated[
        list[str] | None, typer.Option(help="NAME=URL or NAME:MODEL=URL of another server of the same model.")
    ] = None,
) -> None:
    """Measure; machines are noisy, so every figure is a ratio within one run."""
    typer.echo(f"## In the model ({machine(decode_dtype)})\n\n{HEADER}")
    for ratio in decode_table(decode_dtype, decode_rounds):
        typer.echo(ratio.row())
    typer.echo(f"\n## In the trainer ({machine(decode_dtype)})\n\n{HEADER}")
    for ratio in training_table(decode_dtype, training_rounds):
        typer.echo(ratio.row())
    typer.echo(f"\n## In the evaluation ({machine(decode_dtype)})\n\n{HEADER}")
    for ratio in evaluation_table(decode_dtype, evaluation_rounds):
        typer.echo(ratio.row())
    typer.echo(f"\n## In the engine ({machine(engine_dtype)})\n\n{HEADER}")
    for ratio in engine_table(engine_dtype, rounds, dict(each.split("=", 1) for each in peer or [])):
        typer.echo(ratio.row())


if __name__ == "__main__":
    typer.run(main)
