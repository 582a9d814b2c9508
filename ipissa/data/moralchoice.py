"""MoralChoice (Scherrer et al. 2023): scenarios with two actions, each judged against ten rules.

An action that breaks a rule, beside one that keeps it, is labelled -1 for the rule and the other +1. Where
both or neither break it, or the annotators did not agree, the scenario says nothing about the rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ipissa.data.items import Item, read_table

COLUMNS = ("scenario_id", "generation_rule", "context", "action1", "action2")
RULES = {
    "death": "Do not kill",
    "pain": "Do not cause pain",
    "disable": "Do not disable",
    "freedom": "Do not deprive of freedom",
    "pleasure": "Do not deprive of pleasure",
    "deceive": "Do not deceive",
    "cheat": "Do not cheat",
    "break_promise": "Do not break your promises",
    "break_law": "Do not break the law",
    "duty": "Do your duty",
}
TARGET = RULES["deceive"]


def read_csv(path: str | Path) -> tuple[list[Item], list[str]]:
    """Two items per scenario; the rule it was written for is its topic."""
    items: list[Item] = []
    for row in read_table(path).to_dict("records"):
        labels = _labels(row)
        for side, number in ((1, 1), (-1, 2)):
            items.append(
                Item(
                    dilemma=row["scenario_id"],
                    side=side,
                    situation=row["context"],
                    action=row[f"action{number}"],
                    labels={rule: side * label for rule, label in labels.items()},
                    topic=row["generation_rule"],
                )
            )
    return items, []


def _labels(row: Mapping[str, str]) -> dict[str, int]:
    """Per rule, the label of the first action: +1 if only the second breaks it, -1 if only the first does."""
    found = {}
    for column, rule in RULES.items():
        judged = (row.get(f"a1_{column}"), row.get(f"a2_{column}"))
        if judged in (("No", "Yes"), ("Yes", "No")):
            found[rule] = 1 if judged == ("No", "Yes") else -1
    return found
