"""`ipissa`: choose words, train, sweep, calibrate, evaluate, inspect, import, export and serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ipissa.adapter import load_adapter, load_innerpissa, save_adapter, to_lora
from ipissa.adapter.base_model import block_names, describe_base
from ipissa.adapter.control_vector import read_control_vector
from ipissa.adapter.convert import to_peft_folder
from ipissa.adapter.lora import merge, new_folder
from ipissa.cli_errors import assignments, run_cli
from ipissa.data.continuations import MIN_TOKENS
from ipissa.data.personas import Trait
from ipissa.data.prompts import load_prompts, spread
from ipissa.errors import ConfigError
from ipissa.evaluate.cli import app as evaluation
from ipissa.models import DEMO_MODEL, load_model
from ipissa.train import TrainConfig
from ipissa.train import train as run_training
from ipissa.train.calibration import PROMPTS
from ipissa.train.card import describe
from ipissa.train.config import OPTIONS, read_settings
from ipissa.train.presets import preset_settings
from ipissa.train.processes import is_first
from ipissa.train.recalibrate import CalibrationSettings, recalibrate
from ipissa.train.run_folder import check_unfinished
from ipissa.train.sweep import read_grid, run_sweep
from ipissa.train.words import HEADER, compare_words, split_pair

app = typer.Typer(
    help="Steer a language model from the inside: make, inspect, export and serve adapters.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(evaluation)
DOES_NOT_WORK = 3  # exit status of a training whose adapter is measured to be of no use
AdapterOption = Annotated[Path, typer.Option("--adapter", help="Adapter file (.safetensors).")]


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="The .safetensors file to write; a card and the run's folder join it.")],
    positive: Annotated[str | None, typer.Option(help="Word or phrase for α = +1, such as honest.")] = None,
    negative: Annotated[str | None, typer.Option(help="Word or phrase for α = -1, such as dishonest.")] = None,
    model: Annotated[str | None, typer.Option(help="Demo model name, hub id, folder or GGUF file.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Text file, one prompt per line. Default: bundled.")] = None,
    max_prompts: Annotated[int | None, typer.Option(help="Training prompts, at most.")] = None,
    suffixes: Annotated[
        str | None, typer.Option(help="Unfinished answers for contrastive pairs, one per line or a JSON list.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="guided, odd, told, contrastive, antiparallel, or a sum such as guided=1,contrastive=0.1."),
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help="learnt, or a rule that chooses singular triples, such as top or cho_var_snorm.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Directions that turn, per module.")] = None,
    continuations: Annotated[int | None, typer.Option(help="Sampled answers per prompt and pole.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of a sampled answer.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the sampled answers.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step, even.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    held_out: Annotated[int | None, typer.Option(help="Held-out prompts to measure on, at most.")] = None,
    held_out_continuations: Annotated[
        int | None, typer.Option(help="Sampled answers per held-out prompt and pole.")
    ] = None,
    report_to: Annotated[str | None, typer.Option(help="none, tensorboard, wandb or trackio.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling, initialisation and order.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fast (bfloat16 where computed), float32, bfloat16.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options here override it.")] = None,
    preset: Annotated[str | None, typer.Option(help="Named settings, below --config.")] = None,
    set: Annotated[list[str] | None, typer.Option(help="Any other setting, as NAME=VALUE.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The preset quick, over --preset: minutes, to try.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was broken off.")] = False,
    shared: Annotated[
        Path | None,
        typer.Option(help="Folder where runs that ask the base model the same share its texts and teachers."),
    ] = None,
) -> None:
    """Make an adapter from two words and a model, by persona distillation.

    Exit status 3: it is written, with its card, and what was measured says that it is not to be relied on.
    """
    given = {name: value for name, value in locals().items() if name in OPTIONS and value is not None}
    settings = {
        **preset_settings(preset),
        **preset_settings("quick" if quick else None),
        **(read_settings(config) if config else {}),
        **given,
        **assignments("--set", set or []),
    }
    if resume:
        check_unfinished(output)
    result = run_training(TrainConfig.from_dict(settings), output, resume=resume, shared=shared)
    if not is_first():
        return
    card = output.with_suffix(".md")
    typer.echo(card.read_text(encoding="utf-8"))
    typer.echo(f"Wrote {output} and {card} in {result.seconds / 60:.1f} minutes.")
    shortcomings = result.shortcomings()
    for sentence in shortcomings:
        typer.echo(f"Warning: {sentence}", err=True)
    if shortcomings:
        raise typer.Exit(DOES_NOT_WORK)


@app.command()
def words(
    pairs: Annotated[list[str], typer.Argument(help="Pairs to compare, each as 'kind, loving / angry, hateful'.")],
    model: Annotated[str, typer.Option(help="Demo model name, hub id, folder or GGUF file.")] = DEMO_MODEL,
    prompts: Annotated[str | None, typer.Option(help="Text file, one prompt per line. Default: bundled.")] = None,
    max_prompts: Annotated[int, typer.Option(help="Prompts to sample answers to, at most.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="fast, float32 or bfloat16.")] = "fast",
) -> None:
    """Say, before training, how strong and how opposite two personas are on a model; a minute per pair.

    Reach estimates the part of either persona's effect that a dial between the two can recover.
    """
    split = [split_pair(pair) for pair in pairs]
    training, _ = load_prompts(prompts)
    loaded, tokenizer = load_model(model, device=device, dtype=dtype)
    typer.echo(HEADER)
    for found in compare_words(loaded, tokenizer, split, spread(training, max_prompts), seed=seed):
        typer.echo(found.row())


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="YAML file with `base`, shared settings, and `grid`, lists to combine.")],
    output: Annotated[Path, typer.Option(help="Folder for results.csv, summary.csv and the adapters.")],
) -> None:
    """Train over a grid of settings and seeds; begun again, it goes on where it was."""
    results = run_sweep(read_grid(grid), output, run_training)
    typer.echo((output / "summary.csv").read_text(encoding="utf-8"))
    typer.echo(f"Wrote {results}.")


@app.command()
def calibrate(
    adapter: AdapterOption,
    output: Annotated[Path, typer.Option(help="The .safetensors file to write, which may be the same; its card, too.")],
    model: Annotated[str | None, typer.Option(help="Base model. Default: the one the adapter names.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Text file, one prompt per line. Default: those of its training, or bundled.")
    ] = None,
    held_out: Annotated[int, typer.Option(help="Held-out prompts to answer at every α, at most.", min=2)] = PROMPTS,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length of an answer. Default: that of its training, or 32.", min=MIN_TOKENS)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the answers. Default: that of its training.", min=0)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="fast, float32 or bfloat16.")] = "fast",
) -> None:
    """Read the range of α in which text holds together: of imported vectors, too, which come without."""
    settings = CalibrationSettings(model, prompts, held_out, max_new_tokens, seed, device, dtype)
    found = recalibrate(adapter, output, settings)
    typer.echo(describe(found))
    typer.echo(f"Wrote {output} and {output.with_suffix('.md')}.")


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
    if format != "merged" and model is not None:
        raise ConfigError(
            f"format {format} is written without the model, so --model {model} would do nothing; leave it out."
        )
    if format == "peft" and alpha is not None:
        raise ConfigError(f"format peft keeps the dial, so --alpha {alpha:g} would do nothing; leave it out.")
    if format == "peft":
        folder = to_peft_folder(load_innerpissa(adapter), output)
    elif alpha is None:
        raise ConfigError(f"format {format} fixes α, so it needs --alpha, such as --alpha 0.75.")
    elif format == "lora":
        folder = to_lora(load_innerpissa(adapter), alpha=alpha, output_dir=output, dtype=dtype)
    else:
        folder = _export_merged(adapter, alpha, model, dtype, output)
    typer.echo(f"Wrote {folder}.")


EXPORTS = ("lora", "merged", "peft")


def _export_merged(path: Path, alpha: float, model_name: str | None, dtype: str, output: Path) -> Path:
    loaded = load_innerpissa(path)
    model, tokenizer = load_model(model_name or loaded.base_model["name"], device="cpu", dtype=dtype)
    merge(model, loaded, alpha=alpha)
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return output


@app.command(name="import")
def import_vector(
    vector: Annotated[Path, typer.Argument(help="Control vector of repeng or llama.cpp (.gguf).")],
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    positive: Annotated[str, typer.Option(help="What the vector points to, such as honest.")],
    negative: Annotated[str, typer.Option(help="The opposite, such as dishonest.")],
    model: Annotated[str, typer.Option(help="The model it was made for.")] = DEMO_MODEL,
    scale: Annotated[float, typer.Option(help="The coefficient that α = 1 is to mean.")] = 1.0,
) -> None:
    """Turn a control vector into an adapter file that can be served, measured and compared."""
    trait = Trait.from_words(positive, negative)
    loaded, _ = load_model(model, device="cpu")
    found = read_control_vector(
        vector, blocks=block_names(loaded), base_model=describe_base(loaded, model), trait=trait.to_metadata()
    )
    saved = save_adapter(found.scaled(scale), output)
    typer.echo(f"Wrote {output}, with a direction for {len(saved.modules)} blocks.")


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
