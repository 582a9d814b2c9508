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
from typing import Any

import pandas as pd

from ipissa.data.items import Item, read_table
from ipissa.errors import ConfigError

COLUMNS = ("idx", "dilemma_situation", "action_type", "action", "parties_direct", "values_direct")
TARGET = "Value/honesty"
DECIDER = "you"
SIDES = {"to_do": 1, "not_to_do": -1}
GROUPS = {"wvs": "WVS", "mft": "MFT", "virtue": "Virtue", "emotion": "Emotion", "maslow": "Maslow"}


def read_csv(path: str | Path) -> tuple[list[Item], list[str]]:
    """Two items per dilemma."""
    values = partial(_values, source=str(path))
    return paired(read_table(path), "idx", lambda row: set(values(row)))


def paired(
    table: pd.DataFrame, dilemma: str, values: Callable[[Mapping[str, str]], set[str]]
) -> tuple[list[Item], list[str]]:
    """Two items per dilemma, and notes on those that are left out.

    Args:
        table: A row per dilemma and action, with `dilemma_situation`, `action_type` and `action`.
        dilemma: The column that says which rows are of one dilemma.
        values: What a row's action says of the one who decides.
    """
    notes: list[str] = []
    items: list[Item] = []
    for name, rows in table.groupby(dilemma, sort=False):
        sides = {SIDES.get(row["action_type"], 0): row for row in rows.to_dict("records")}
        if len(rows) != 2 or set(sides) != set(SIDES.values()):
            notes.append(f"Dilemma {name} has no to_do and not_to_do row and was left out.")
            continue
        held = {side: values(row) for side, row in sides.items()}
        for side, row in sorted(sides.items(), reverse=True):
            own, other = held[side] - held[-side], held[-side] - held[side]
            items.append(
                Item(
                    dilemma=str(name),
                    side=side,
                    situation=row["dilemma_situation"],
                    action=row["action"],
                    labels=dict.fromkeys(sorted(own), 1) | dict.fromkeys(sorted(other), -1),
                    topic=row.get("topic_group", ""),
                )
            )
    return items, notes


def names_in(cell: str) -> list[str]:
    """The values that a cell names: some name several, with commas."""
    return [name.strip() for name in cell.lower().split(",") if name.strip()]


def _values(row: Mapping[str, str], *, source: str) -> Iterator[str]:
    """The values that the decider holds on this side, and their groups."""
    where = f"{source}, dilemma {row['idx']}"
    groups = _groups_of_values(row, where)
    for kind in ("direct", "indirect"):
        parties, held = _list(row, f"parties_{kind}", where), _list(row, f"values_{kind}", where)
        for party, value in zip(parties, held, strict=False):  # some rows name more parties than values
            if value is not None and str(party).strip().lower() == DECIDER:
                for name in names_in(str(value)):
                    yield f"Value/{name}"
                    yield from groups.get(name, ())


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
