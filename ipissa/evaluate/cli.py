"""The commands that measure: `ipissa eval`, and what sums up several of its folders or a sweep."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer

from ipissa.errors import ConfigError
from ipissa.evaluate.methods import METHODS, QUICK_METHODS
from ipissa.evaluate.report.page import summary
from ipissa.evaluate.report.seeds import summarise_seeds
from ipissa.evaluate.report.sweeps import FIGURES, figure_by, read_results, table_by
from ipissa.evaluate.run import evaluate as run_evaluation
from ipissa.evaluate.settings import EvalSettings
from ipissa.files import write_text

app = typer.Typer()
AdapterOption = Annotated[Path, typer.Option("--adapter", help="Adapter file (.safetensors).")]


@app.command(name="eval")
def evaluate(
    adapter: AdapterOption,
    output: Annotated[Path, typer.Option(help="Folder for the report; begun again, it goes on where it was.")],
    baselines: Annotated[
        str, typer.Option(help=f"Other ways to steer, with commas, of {', '.join(METHODS)}; empty for none.")
    ] = ",".join(QUICK_METHODS),
    model: Annotated[str | None, typer.Option(help="Base model. Default: the one the adapter names.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Text file, one prompt per line. Default: bundled.")] = None,
    held_out: Annotated[int, typer.Option(help="Held-out prompts, at most.", min=2)] = 100,
    dataset: Annotated[
        str, typer.Option(help="Dilemmas: bundled, a JSONL or CSV file, a hub id; empty for none.")
    ] = "bundled",
    target: Annotated[str | None, typer.Option(help="The value to measure. Default: the data set's own.")] = None,
    topic: Annotated[str | None, typer.Option(help="Only dilemmas of this topic.")] = None,
    max_items: Annotated[int | None, typer.Option(help="Items, at most; about the target first.", min=6)] = None,
    alphas: Annotated[str, typer.Option(help="At which dilemmas are asked, with commas.")] = "-1,-0.5,0,0.5,1",
    null: Annotated[int, typer.Option(help="Random adapters to compare with.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of methods that are random or trained.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="fast, float32 or bfloat16.")] = "fast",
    shared: Annotated[
        Path | None,
        typer.Option(help="Folder where runs that ask the base model the same share its texts and teachers."),
    ] = None,
) -> None:
    """Measure an adapter beside other ways to steer, on held-out texts and in dilemmas."""
    findings = run_evaluation(
        adapter,
        output,
        EvalSettings(
            baselines=tuple(_listed(baselines)),
            model=model,
            prompts=prompts,
            held_out=held_out,
            dataset=dataset or None,
            target=target,
            topic=topic,
            max_items=max_items,
            alphas=tuple(_number(each) for each in _listed(alphas)),
            null=null,
            seed=seed,
            device=device,
            dtype=dtype,
        ),
        shared=shared,
    )
    typer.echo(summary(findings))
    typer.echo(f"Wrote {output / 'report.html'}.")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"alphas hold {text!r}, which is not a number; use some such as -1,0,1.") from None


@app.command()
def medians(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of `ipissa eval` that differ in seeds, or in the machine, only.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for medians.md, medians.csv and medians.json.")],
) -> None:
    """Sum up evaluations over seeds: medians, the lowest and the highest."""
    typer.echo(summarise_seeds(folders, output))


@app.command()
def table(
    results: Annotated[Path, typer.Argument(help="results.csv of `ipissa sweep`.")],
    by: Annotated[str, typer.Option(help="The setting to compare, such as depth_end or weight_decay.")],
    output: Annotated[Path, typer.Option(help="Folder for a table (CSV) and a figure (PNG).")],
    figure: Annotated[str, typer.Option(help=f"What to draw: {', '.join(FIGURES)}.")] = FIGURES[0],
) -> None:
    """Compare the values of one setting of a sweep: medians with counts, and a figure."""
    if figure not in FIGURES:
        raise ConfigError(f"figure {figure!r} is unknown; use one of {', '.join(FIGURES)}.")
    runs = read_results(results)
    found = table_by(runs, by)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / f"by-{by}.csv", found.to_csv(index=False))
    buffer = BytesIO()
    figure_by(runs, by, figure).savefig(buffer, format="png")
    (output / f"by-{by}-{figure}.png").write_bytes(buffer.getvalue())
    typer.echo(found.to_string(index=False))
