"""DailyDilemmas as the Hugging Face hub has it: what a file has in one row is in three tables there.

dilemmas    `dilemma_idx`, `action_type`, `dilemma_situation`, `action`: two rows per dilemma
parties     `dilemma_idx`, `action_type`, `party`, `value`: who holds which value there
values      `value` and its groups, a column each

They are told apart by these columns, whatever their files are called. What counts is as in `dilemmas`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import pandas as pd
from huggingface_hub import HfApi, hf_hub_download

from ipissa.data.dilemmas import DECIDER, GROUPS, names_in, paired
from ipissa.data.items import Item, read_table
from ipissa.errors import ConfigError

T = TypeVar("T")
TABLES = {
    "dilemmas": {"dilemma_idx", "action_type", "dilemma_situation", "action"},
    "parties": {"dilemma_idx", "action_type", "party", "value"},
    "values": {"value", *GROUPS.values()},
}


def read_hub(name: str) -> tuple[list[Item], list[str]]:
    """Two items per dilemma.

    Raises:
        ConfigError: the hub cannot be reached, has no such data set, or one of the tables is missing.
    """
    found = _tables(name)
    held = _held_by_the_decider(found["parties"], _groups(found["values"]))
    return paired(found["dilemmas"], "dilemma_idx", lambda row: held[row["dilemma_idx"], row["action_type"]])


def _tables(name: str) -> dict[str, pd.DataFrame]:
    """Every table of `TABLES`, from the first CSV file that has its columns."""
    found: dict[str, pd.DataFrame] = {}
    for path in _from_hub(name, partial(HfApi().list_repo_files, name, repo_type="dataset")):
        if path.endswith(".csv"):
            table = read_table(_from_hub(name, partial(hf_hub_download, name, path, repo_type="dataset")))
            for kind, columns in TABLES.items():
                if kind not in found and columns <= set(table.columns):
                    found[kind] = table
    for kind, columns in TABLES.items():
        if kind not in found:
            raise ConfigError(
                f"The data set {name!r} has no CSV file with the columns {', '.join(sorted(columns))}, which "
                "DailyDilemmas has; give that one, or the path of a file."
            )
    return found


def _from_hub(name: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except Exception as error:  # the hub's client raises the errors of whichever HTTP library it uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"The data set {name!r} is no file here and cannot be had from the hub ({reason}); "
            "give the path of a CSV or JSONL file."
        ) from error


def _groups(values: pd.DataFrame) -> dict[str, set[str]]:
    """Every value with its groups, such as honesty: Virtue/Truthfulness."""
    return {
        row["value"].lower(): {f"{group}/{row[group]}" for group in GROUPS.values() if row[group]}
        for row in values.to_dict("records")
    }


def _held_by_the_decider(parties: pd.DataFrame, groups: Mapping[str, set[str]]) -> dict[tuple[str, str], set[str]]:
    """By dilemma and action, the values that taking it says the one who decides has, with their groups."""
    held: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in parties.to_dict("records"):
        if row["party"].strip().lower() == DECIDER:
            for name in names_in(row["value"]):
                held[row["dilemma_idx"], row["action_type"]] |= {f"Value/{name}"} | groups.get(name, set())
    return held
