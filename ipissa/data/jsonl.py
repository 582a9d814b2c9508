"""Items of one's own, as JSON lines; the bundled set is one of these files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipissa.data.items import CONTROLS, Item
from ipissa.errors import ConfigError

TARGET = "target"  # the value that a plain `label` is about


def read_jsonl(path: str | Path) -> tuple[list[Item], list[str]]:
    """Items of one's own: a JSON object per line with `situation`, `action` and `label`.

    `label` is 1 where the action shows the value and -1 where it goes against it. Optional: `value`, its
    name; `values`, an object of labels for several; `dilemma`, what the two sides of a dilemma share
    (default: the situation); `domain`, `maths` or `preference` for controls; `topic`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The data set {path} cannot be read ({error}); give a UTF-8 file of JSON lines.") from error
    items: list[Item] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            item = _parsed(line, f"{path}, line {number}", seen)
            items.append(item)
            seen[item.dilemma] = seen.get(item.dilemma, 0) + 1
    return items, []


def _parsed(line: str, where: str, seen: Mapping[str, int]) -> Item:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where} is not an object with situation, action and label.")
    record = {key: value for key, value in record.items() if value is not None}  # pandas writes absent fields so
    for key in ("situation", "action"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise ConfigError(f"{where} has no {key}; give a text.")
    dilemma = str(record.get("dilemma", record["situation"]))
    domain = str(record.get("domain", "values"))
    if domain not in ("values", *CONTROLS):
        raise ConfigError(f"{where} has the domain {domain!r}; use values, {' or '.join(CONTROLS)}.")
    return Item(
        dilemma=dilemma,
        side=1 if seen.get(dilemma, 0) % 2 == 0 else -1,  # the first that is asked is the one to do
        situation=record["situation"].strip(),
        action=record["action"].strip(),
        labels=_labels(record, where),
        domain=domain,
        topic=str(record.get("topic", "")),
    )


def _labels(record: Mapping[str, Any], where: str) -> dict[str, int]:
    labels = record.get("values")
    if labels is None:
        labels = {str(record.get("value", TARGET)): record.get("label")}
    if not isinstance(labels, dict) or not labels:
        raise ConfigError(f"{where} has no label; give 1 where the action shows the value, -1 where it does not.")
    for value, label in labels.items():
        if isinstance(label, bool) or label not in (1, -1):
            raise ConfigError(
                f"{where} has the label {label!r} for {value!r}; give 1 where the action shows it, else -1."
            )
    return {str(value): int(label) for value, label in labels.items()}
