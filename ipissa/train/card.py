"""Say what an adapter is and does, in Markdown, from what its file holds."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ipissa.adapter.checkpoint import Adapter, AnyAdapter
from ipissa.data.personas import TEMPLATE
from ipissa.errors import ConfigError
from ipissa.evaluate.yardsticks import ResponsePoint, Yardsticks, response_symmetry
from ipissa.files import write_text
from ipissa.train.calibration import DRAWS_AT_ZERO, MAX_EXCESS_NATS, MAX_VARIATION, MIN_DISTINCT
from ipissa.train.config import OPTIONS, TrainConfig
from ipissa.train.result import TrainResult
from ipissa.train.samples import samples_table

GAIN_AIMED_AT = 0.6
DIGEST = "sha256"
MADE = "## How it was made"
# Options whose values are always worth showing in the training command.
ALWAYS_SHOWN = ("positive", "negative", "model", "selection", "rank", "lr", "epochs")  # defaults change


def write_card(result: TrainResult, output: str | os.PathLike[str]) -> Path:
    """Write the card of a freshly trained adapter beside its file."""
    path = Path(output)
    card = path.with_suffix(".md")
    parts = [
        _what_it_is(path.stem, result.adapter),
        _command(result.adapter, path),
        samples_table({"before training": result.samples_before, "after": result.samples_after}),
    ]
    write_text(card, "\n\n".join(parts) + "\n")
    return card


def checked_card(output: Path) -> Path:
    """Where the card of `output` goes, refused before hours of work where something else is there.

    Raises:
        ConfigError: that file says nothing of an adapter's digest, as a card does, or cannot be read.
    """
    card = output.with_suffix(".md")
    if card.exists() and f"| {DIGEST} |" not in _text(card):
        raise ConfigError(f"{card} is not the card of an adapter; move it away, or choose another --output.")
    return card


def renew_card(adapter: AnyAdapter, card: Path, *, before: str) -> None:
    """Write the card of an adapter that was changed after its training.

    Args:
        card: Where it goes (`checked_card`).
        before: The card that it had; how it was made, and samples, stay as they are there.
    """
    _, made, rest = before.partition(MADE)
    write_text(card, f"{_what_it_is(card.stem, adapter)}\n\n{made}{rest}".rstrip() + "\n")


def card_of(adapter: AnyAdapter, path: Path) -> str:
    """The card beside an adapter's file, empty where there is none of this very adapter."""
    card = path.with_suffix(".md")
    text = _text(card) if card.exists() else ""
    return text if f"| {DIGEST} | {adapter.digest} |" in text else ""


def _text(card: Path) -> str:
    try:
        return card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The card {card} cannot be read: {error}; move it away.") from error


def _what_it_is(name: str, adapter: AnyAdapter) -> str:
    found = adapter.evaluation.get("yardsticks")
    shortcomings = Yardsticks.from_dict(found).shortcomings(adapter.alpha_range) if found else []
    return "\n\n".join([f"# {name}", *(f"**{sentence}**" for sentence in shortcomings), describe(adapter)])


def describe(adapter: AnyAdapter) -> str:
    """What an adapter is, its range, and its yardsticks, in Markdown."""
    trait = adapter.trait
    low, high = adapter.alpha_range
    rows = {
        "kind": adapter.kind,
        "base model": adapter.base_model.get("name", "unknown"),
        "α = +1": _meaning(trait, "positive"),
        "α = -1": _meaning(trait, "negative"),
        "calibrated α range" if adapter.calibrated else "α range": f"{low:+g} to {high:+g}, {_read_from(adapter)}",
        **(_rotations(adapter) if isinstance(adapter, Adapter) else {"modules": f"{len(adapter.modules)}"}),
        DIGEST: adapter.digest or "not saved yet",
        "licence": adapter.license,
    }
    table = "| | |\n|-|-|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    sections = [table]
    if "yardsticks" in adapter.evaluation:
        sections.append(_yardsticks(adapter.evaluation["yardsticks"]))
    if "reach" in adapter.evaluation:
        sections.append(_reach(adapter.evaluation["reach"]))
    if "response" in adapter.evaluation:
        sections.append(_response(adapter.evaluation["response"]))
    if "calibration" in adapter.evaluation:
        sections.append(_calibration(adapter.evaluation["calibration"], adapter.evaluation.get("training")))
    return "\n\n".join(sections)


def _read_from(adapter: AnyAdapter) -> str:
    if adapter.calibrated:
        return "where generated text holds together"
    return "not known to be read from text (`ipissa calibrate` reads it)"


def _meaning(trait: Mapping[str, Any], pole: str) -> str:
    """`a kind person`, or the whole line where it is not the usual one."""
    template = trait.get("template", TEMPLATE)
    return f"{trait[pole]} person" if template == TEMPLATE else template.format(persona=trait[pole])


def _rotations(adapter: Adapter) -> dict[str, str]:
    config = adapter.config
    learnt = config.directions == "learnt"
    trained = ("V",) if learnt else ("rotation_v", "rotation_u", "delta_s")  # a frame has as many numbers as its V
    parameters = sum(
        value.numel() for m in adapter.modules.values() for name, value in m.tensors().items() if name in trained
    )
    of_triples = f"{_sides(config)}; scale mode {config.scale_mode}; clamp {config.clamp} {config.max_rotation:g}"
    return {
        "adapted modules": f"{len(adapter.modules)}, rank {config.rank}, {parameters:,} parameters",
        "rotation": f"{config.rotation}, {'V, in learnt directions' if learnt else of_triples}",
    }


def _sides(config: Any) -> str:
    return " and ".join(side for side, on in (("V", config.rotate_v), ("U", config.rotate_u)) if on) or "none"


def _yardsticks(yardsticks: Mapping[str, Any]) -> str:
    def cell(estimate: Mapping[str, float]) -> str:
        return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}], t {estimate['t']:.1f}"

    lines = [
        f"## Yardsticks on {yardsticks['prompts']} held-out prompts, |α| = {yardsticks['alpha']:g}",
        "",
        "| pole | trait gain | plain gain (nats per token) | contrast |",
        "|-|-|-|-|",
        *(
            f"| {pole} | {cell(yardsticks[pole]['trait_gain'])} | {cell(yardsticks[pole]['plain_gain'])} "
            f"| {cell(yardsticks[pole]['contrast'])} |"
            for pole in ("positive", "negative")
        ),
        "",
        "Trait gain is the part of a persona prompt's own effect that steering recovers (1: as good as being told); "
        "plain gain is what a user without a persona line gets; contrast is easily gamed and never quoted alone. "
        "Brackets are 95 % bootstrap intervals over prompts; t is not of the ratio but of what steering adds being 0 "
        "(its mean over prompts, over the standard error of that).",
        "",
        _against_the_aim(yardsticks),
    ]
    return "\n".join(lines)


def _against_the_aim(yardsticks: Mapping[str, Any]) -> str:
    reached = [pole for pole in ("positive", "negative") if yardsticks[pole]["trait_gain"]["value"] >= GAIN_AIMED_AT]
    where = {0: "at neither pole", 1: f"at the {''.join(reached)} pole only", 2: "at both poles"}[len(reached)]
    return (
        f"A trait gain of {GAIN_AIMED_AT:g}, more than half of what being told does, is reached {where} of these "
        "prompts; `ipissa eval` has prompts of its own, on which no default was chosen."
    )


def _reach(reach: Mapping[str, float]) -> str:
    return (
        f"Reach of these words on this model: {reach['odd']:.2f}. Told so, the model moves {reach['positive']:.3f} "
        f"(positive) and {reach['negative']:.3f} (negative) nats per token away from the neutral persona, partly in "
        "the same direction. Reach is a forecast of the trait gain for a dial that does exactly the opposite at -1 of "
        "what it does at +1; real dials do not, and may have much more."
    )


def _response(points: Sequence[Mapping[str, float]]) -> str:
    lines = [
        "## Response",
        "",
        "Nats per token by which held-out texts become likelier than at α = 0, without personas.",
        "",
        "| α | texts of the positive pole | of the negative pole |",
        "|-|-|-|",
        *(f"| {p['alpha']:+g} | {p['positive']:+.4f} | {p['negative']:+.4f} |" for p in points),
        "",
        f"Symmetry, the smaller of what α = 1 and α = -1 do over the larger: {_symmetry(points):.2f}.",
    ]
    return "\n".join(lines)


def _symmetry(points: Sequence[Mapping[str, float]]) -> float:
    return response_symmetry([ResponsePoint(**point) for point in points])


def _written(prompts: int, sampling: Mapping[str, Any]) -> str:
    return (
        f"Answers to {prompts} held-out prompts, at α = 0 {DRAWS_AT_ZERO} to each, of up to "
        f"{sampling['max_new_tokens']} tokens at temperature {sampling['temperature']:g} and top-p "
        f"{sampling['top_p']:g}: what longer ones do is not known."
    )


def _calibration(calibration: Mapping[str, Any], training: Mapping[str, Any] | None) -> str:
    sampling = calibration.get("sampling", training)  # older files have it there only
    lines = [
        "## Text written at each α",
        "",
        *([_written(calibration["prompts"], sampling), ""] if sampling and "prompts" in calibration else []),
        "| α | nats per token, read by the base model | distinct 3-grams | shift per token | holds |",
    ]
    lines.append("|-|-|-|-|-|")
    for point in calibration["points"]:
        verdict = "yes" if point["holds"] else "no"
        shift = f"{point['variation']:.3f}" if "variation" in point else ""  # older files lack it
        lines.append(
            f"| {point['alpha']:+g} | {point['base_nats']:.2f} | {point['distinct']:.3f} | {shift} | {verdict} |"
        )
    lines += [
        "",
        "Shift is the mean total variation between what the steered and the base model expect next. Text holds "
        f"together while, against α = 0, it costs at most {MAX_EXCESS_NATS:g} nats per token more and its share of "
        f"distinct 3-grams is at least {MIN_DISTINCT:.0%} of that there, and while the shift is at most "
        f"{MAX_VARIATION:g}.",
    ]
    return "\n".join(lines)


def _option(name: str, value: Any) -> str:
    if name in OPTIONS:
        return f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
    in_yaml = json.dumps(value, ensure_ascii=False)  # bare, `no` or `a: b` would be something else
    return f"--set {shlex.quote(f'{name}={in_yaml}')}"


def _command(adapter: Adapter, path: Path) -> str:
    """The command that makes this adapter: every setting that is not the default."""
    training = adapter.evaluation["training"]
    defaults = TrainConfig(training["positive"], training["negative"]).to_dict()
    options = [f"--{name} {shlex.quote(str(training[name]))}" for name in ALWAYS_SHOWN]
    for name, default in defaults.items():
        if name not in ALWAYS_SHOWN and training.get(name, default) != default:  # a setting may have come later
            options.append(_option(name, training[name]))
    command = " \\\n    ".join(["ipissa train", *options, f"--output {path.name}"])
    since = " since it was resumed, what came before not counted" if training.get("resumed") else ""
    held = f", the base model in {training['computed_in']}" if "computed_in" in training else ""
    several = training.get("processes", 1)
    shared = f", by {several} processes, so that a step had {several * training['batch_size']} rows"
    took = f"This took {training['seconds'] / 60:.0f} minutes{since}{held}{shared if several > 1 else ''}."
    return f"{MADE}\n\n```\n{command}\n```\n\n{took}"
