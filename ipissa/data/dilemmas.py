"""DailyDilemmas (Chiu et al. 2024): everyday dilemmas to do something or not, with the values at stake.

A value counts for a side where it is held by the party "You": what taking that side says about the one
who decides. Its groups (World Values Survey, Moral Foundations, virtues, emotions, Maslow) count with it.
Values of both sides say nothing about the choice and are dropped.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from huggingface_hub import HfApi, hf_hub_download

from ipissa.data.items import Item, read_table
from ipissa.errors import ConfigError

T = TypeVar("T")
COLUMNS = ("idx", "dilemma_situation", "action_type", "action", "parties_direct", "values_direct")
TARGET = "Value/honesty"
DECIDER = "you"
SIDES = {"to_do": 1, "not_to_do": -1}
GROUPS = {"wvs": "WVS", "mft": "MFT", "virtue": "Virtue", "emotion": "Emotion", "maslow": "Maslow"}


def read_csv(path: str | Path) -> tuple[list[Item], list[str]]:
    """Two items per dilemma."""
    return _items(read_table(path), str(path))


def read_hub(name: str) -> tuple[list[Item], list[str]]:
    """The same from the hub: of a data set's CSV files, the one that has the columns.

    Raises:
        ConfigError: the hub cannot be reached, or has no such data set or file.
    """
    for path in _from_hub(name, partial(HfApi().list_repo_files, name, repo_type="dataset")):
        if path.endswith(".csv"):
            table = read_table(_from_hub(name, partial(hf_hub_download, name, path, repo_type="dataset")))
            if set(table.columns) >= set(COLUMNS):
                return _items(table, name)
    raise ConfigError(f"The data set {name!r} has no CSV file with the columns {', '.join(COLUMNS)}.")


def _from_hub(name: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except Exception as error:  # the hub's client raises the errors of whichever HTTP library it uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"The data set {name!r} is no file here and cannot be had from the hub ({reason}); "
            "give the path of a CSV or JSONL file."
        ) from error


def _items(table: pd.DataFrame, source: str) -> tuple[list[Item], list[str]]:
    notes: list[str] = []
    items: list[Item] = []
    for dilemma, rows in table.groupby("idx", sort=False):
        sides = {SIDES.get(row["action_type"], 0): row for row in rows.to_dict("records")}
        if len(rows) != 2 or set(sides) != set(SIDES.values()):
            notes.append(f"Dilemma {dilemma} has no to_do and not_to_do row and was left out.")
            continue
        values = {side: set(_values(row, f"{source}, dilemma {dilemma}")) for side, row in sides.items()}
        for side, row in sorted(sides.items(), reverse=True):
            own, other = values[side] - values[-side], values[-side] - values[side]
            items.append(
                Item(
                    dilemma=str(dilemma),
                    side=side,
                    situation=row["dilemma_situation"],
                    action=row["action"],
                    labels=dict.fromkeys(sorted(own), 1) | dict.fromkeys(sorted(other), -1),
                    topic=row.get("topic_group", ""),
                )
            )
    return items, notes


def _values(row: Mapping[str, str], where: str) -> Iterator[str]:
    """The values that the decider holds on this side, and their groups."""
    groups = _groups_of_values(row, where)
    for kind in ("direct", "indirect"):
        parties, held = _list(row, f"parties_{kind}", where), _list(row, f"values_{kind}", where)
        for party, value in zip(parties, held, strict=False):  # some rows name more parties than values
            if value is not None and str(party).strip().lower() == DECIDER:
                for name in str(value).lower().split(","):
                    if name.strip():
                        yield f"Value/{name.strip()}"
                        yield from groups.get(name.strip(), ())


def _groups_of_values(row: Mapping[str, str], where: str) -> dict[str, list[str]]:
    """Every value of the row with its groups, such as honesty: Virtue/Truthfulness."""
    names = [str(name).lower() for name in _list(row, "values_names", where)]
    found: dict[str, list[str]] = {name: [] for name in names}
    for column, prefix in GROUPS.items():
        for name, group in zip(names, _list(row, column, where), strict=False):
            if group is not None:
                found[name].append(f"{prefix}/{group}")
    return found


def _list(row: Mapping[str, Any], column: str, where: str) -> Sequence[Any]:
    """A Python list that was written into a cell, where nan stands for nothing."""
    text = row.get(column, "")
    if not text:
        return []
    try:
        found = ast.literal_eval(re.sub(r"(?<=[\[ ])nan(?=[,\]])", "None", text))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{where}: the column {column} holds {text[:60]!r}, which is not a list.") from error
    return found if isinstance(found, list) else [found]
