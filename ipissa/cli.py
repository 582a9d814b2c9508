"""`ipissa`: train, export, inspect, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ipissa.adapter import load_adapter, to_lora
from ipissa.adapter.convert import to_peft_folder
from ipissa.adapter.lora import merge, new_folder
from ipissa.cli_errors import run_cli
from ipissa.errors import ConfigError
from ipissa.models import DEMO_MODEL, load_model
from ipissa.train import TrainConfig, write_card
from ipissa.train import train as run_training
from ipissa.train.card import describe

app = typer.Typer(
    help="Steer a language model from the inside: make, inspect, export and serve adapters.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
AdapterOption = Annotated[Path, typer.Option("--adapter", help="Adapter file (.safetensors).")]


@app.command()
def train(
    positive: Annotated[str, typer.Option(help="Word or phrase for α = +1, such as honest.")],
    negative: Annotated[str, typer.Option(help="Word or phrase for α = -1, such as dishonest.")],
    output: Annotated[Path, typer.Option(help="The .safetensors file to write; a card is written beside it.")],
    model: Annotated[str, typer.Option(help="Demo model name, hub id, folder or GGUF file.")] = DEMO_MODEL,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line. Default: bundled.")] = None,
    rank: Annotated[int, typer.Option(help="Singular triples per module.")] = TrainConfig.rank,
    continuations: Annotated[
        int, typer.Option(help="Sampled answers per prompt and pole.")
    ] = TrainConfig.continuations,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a sampled answer.")] = TrainConfig.max_new_tokens,
    epochs: Annotated[float, typer.Option(help="Passes over the sampled answers.")] = TrainConfig.epochs,
    batch_size: Annotated[int, typer.Option(help="Rows per step, even.")] = TrainConfig.batch_size,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = TrainConfig.lr,
    held_out: Annotated[int, typer.Option(help="Held-out prompts to measure on, at most.")] = TrainConfig.held_out,
    held_out_continuations: Annotated[
        int, typer.Option(help="Sampled answers per held-out prompt and pole.")
    ] = TrainConfig.held_out_continuations,
    seed: Annotated[int, typer.Option(help="Seed of sampling, initialisation and order.")] = TrainConfig.seed,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = TrainConfig.device,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = TrainConfig.dtype,
) -> None:
    """Make an adapter from two words and a model, by persona distillation."""
    config = TrainConfig(
        positive=positive,
        negative=negative,
        model=model,
        prompts=None if prompts is None else str(prompts),
        rank=rank,
        continuations=continuations,
        max_new_tokens=max_new_tokens,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        held_out=held_out,
        held_out_continuations=held_out_continuations,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    result = run_training(config, output)
    card = write_card(result, output)
    typer.echo(card.read_text(encoding="utf-8"))
    typer.echo(f"Wrote {output} and {card} in {result.seconds / 60:.1f} minutes.")


@app.command()
def export(
    adapter: AdapterOption,
    output: Annotated[Path, typer.Option(help="Folder to write; must be empty or new.")],
    format: Annotated[str, typer.Option(help="lora, merged (a whole model) or peft (the adapter itself).")] = "lora",
    alpha: Annotated[float | None, typer.Option(help="The α to fix, for lora and merged.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model for merged. Default: the one the adapter names.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, for lora and merged.")] = "float32",
) -> None:
    """Write an adapter at one α as a LoRA or merged into its base model, or in PEFT's form."""
    if format not in EXPORTS:
        raise ConfigError(f"format {format!r} is unknown; use {', '.join(EXPORTS)}.")
    if format == "peft":
        folder = to_peft_folder(load_adapter(adapter), output)
    elif alpha is None:
        raise ConfigError(f"format {format} fixes α, so it needs --alpha, such as --alpha 0.75.")
    elif format == "lora":
        folder = to_lora(load_adapter(adapter), alpha=alpha, output_dir=output, dtype=dtype)
    else:
        folder = _export_merged(adapter, alpha, model, dtype, output)
    typer.echo(f"Wrote {folder}.")


EXPORTS = ("lora", "merged", "peft")


def _export_merged(path: Path, alpha: float, model_name: str | None, dtype: str, output: Path) -> Path:
    loaded = load_adapter(path)
    model, tokenizer = load_model(model_name or loaded.base_model["name"], device="cpu", dtype=dtype)
    merge(model, loaded, alpha=alpha)
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return output


@app.command()
def inspect(adapter: Annotated[Path, typer.Argument(help="Adapter file (.safetensors).")]) -> None:
    """Check an adapter file and say what it holds."""
    typer.echo(describe(load_adapter(adapter)))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """The same as `ipissa-serve`, with the same options."""
    # A library must not need its server; the command is here for people who look for it here.
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="ipissa-serve")
    entry.load()(context.args)


def main() -> None:
    """Entry point of `ipissa`."""
    run_cli(app)
