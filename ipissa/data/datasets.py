"""Which reader a data set needs, and what of it to measure on."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from ipissa.data import dilemmas, dilemmas_hub, jsonl, moralchoice
from ipissa.data.items import Dataset, Item, check_items, first_dilemmas, listed, read_table
from ipissa.errors import ConfigError

BUNDLED = "bundled"
FILES = (".csv", ".jsonl", ".json")  # what is not of the hub, though no such file is here
BUNDLED_ITEMS = str(files("ipissa.data").joinpath("items.jsonl"))


def load_items(
    source: str | Path = BUNDLED, *, target: str | None = None, topic: str | None = None, max_items: int | None = None
) -> Dataset:
    """Items from the bundled set, a JSONL or CSV file, or a data set of the Hugging Face hub.

    Args:
        source: `bundled`, a path, or a hub id such as `kellycyy/daily_dilemmas`.
        target: The value to measure. Default: the data set's own.
        topic: Only dilemmas filed under it.
        max_items: At most so many, whole dilemmas, those about the target first.

    Raises:
        ConfigError: the source cannot be read, holds no items, or cannot answer whether the target moved.
    """
    read, default = _reader(source)
    items, notes = read(source)
    if topic is not None:
        topics = sorted({item.topic for item in items})
        items = [item for item in items if item.topic == topic]
        if not items:
            raise ConfigError(f"{source} has no dilemma of topic {topic!r}; its topics are {listed(topics)}.")
    chosen = target or default
    items = first_dilemmas(items, chosen, max_items)
    check_items(items, chosen, source=str(source))
    return Dataset(Path(source).name if Path(source).exists() else str(source), items, chosen, notes)


Reader = Callable[[Any], tuple[list[Item], list[str]]]


def _reader(source: str | Path) -> tuple[Reader, str]:
    """How to read a source, and the value it is about unless another is asked for."""
    if str(source) == BUNDLED:
        return (lambda _: jsonl.read_jsonl(BUNDLED_ITEMS)), "honesty"
    path = Path(source)
    if not path.exists() and str(source).count("/") == 1 and path.suffix.lower() not in FILES:
        return dilemmas_hub.read_hub, dilemmas.TARGET
    if path.suffix.lower() != ".csv":
        return jsonl.read_jsonl, jsonl.TARGET
    columns = set(read_table(path).columns)
    for module in (moralchoice, dilemmas):
        if columns >= set(module.COLUMNS):
            return module.read_csv, module.TARGET
    raise ConfigError(
        f"{path} has the columns {listed(sorted(columns))}, which are neither those of MoralChoice "
        f"({listed(moralchoice.COLUMNS)}) nor of DailyDilemmas ({listed(dilemmas.COLUMNS)})."
    )
