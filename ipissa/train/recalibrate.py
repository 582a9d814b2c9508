"""Read an adapter's range anew, or for the first time: nobody has of imported vectors and converted adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ipissa.adapter.checkpoint import AnyAdapter, load_adapter, save_adapter
from ipissa.data.continuations import Sampling
from ipissa.data.prompts import load_prompts
from ipissa.files import checked_output
from ipissa.models import load_model
from ipissa.steering import attach
from ipissa.train.calibration import PROMPTS, calibrate, with_range
from ipissa.train.card import card_of, checked_card, renew_card

REMEDY = (
    "α = 1 is too much of it: make it mean less (`ipissa import --scale` of a control vector), or train it at a lower "
    "--lr"
)


@dataclass(frozen=True)
class CalibrationSettings:
    """How a range is read.

    Args:
        model: Base model: demo model name, hub id, folder or GGUF file; None for the one that the adapter names.
        prompts: Text file with one prompt per line, of which every fourth is asked; None for those of the training.
        held_out: Prompts that are answered at every α, at most.
        max_new_tokens: Length of an answer; None for that of the training.
        seed: Of the answers; None for that of the training.
        device, dtype: As `ipissa.load_model` has them.
    """

    model: str | None = None
    prompts: str | None = None
    held_out: int = PROMPTS
    max_new_tokens: int | None = None
    seed: int | None = None
    device: str = "auto"
    dtype: str = "fast"


def recalibrate(
    path: str | os.PathLike[str], output: str | os.PathLike[str], settings: CalibrationSettings
) -> AnyAdapter:
    """Write the adapter to `output` with the range in which text that is generated now holds together, and its card.

    What steers stays as it is; the range changes, what it was read from, and so the digest.

    Raises:
        AdapterFileError, BaseModelMismatchError, ConfigError: before anything is sampled.
        TrainingError: there is no such range; nothing is written.
    """
    output = checked_output(output)
    card = checked_card(output)
    adapter = load_adapter(path)
    before = card_of(adapter, Path(path))
    trained = adapter.evaluation.get("training", {})
    _, held_out = load_prompts(settings.prompts or trained.get("prompts"))
    model, tokenizer = load_model(
        settings.model or adapter.base_model["name"], device=settings.device, dtype=settings.dtype
    )
    found = calibrate(
        attach(model, adapter),
        tokenizer,
        held_out[: settings.held_out],
        sampling=_sampling(trained, settings.max_new_tokens),
        seed=trained.get("seed", 0) if settings.seed is None else settings.seed,
        remedy=REMEDY,
    )
    written = save_adapter(with_range(adapter, found), output)
    renew_card(written, card, before=before)
    return written


def _sampling(trained: Mapping[str, Any], max_new_tokens: int | None) -> Sampling:
    """As the answers that it was trained on were drawn, or as the trainer draws them."""
    said = {field.name: trained[field.name] for field in fields(Sampling) if field.name in trained}
    drawn = Sampling(**said)
    return drawn if max_new_tokens is None else replace(drawn, max_new_tokens=max_new_tokens)
