"""Tables as the page shows them: a figure with its interval in one cell, words instead of column names."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

BOUNDS = ("low", "high")
# What is shown of every table, and under which title; the CSV files have all.
YARDSTICKS = {
    "pole": "pole",
    "trait_gain": "trait gain",
    "without_echoes": "without echoes",
    "adapter_more": "the adapter has more by",
    "plain_gain": "plain gain (nats)",
    "contrast": "contrast",
}
EQUAL = {
    "method": "method",
    "scale": "scale",
    "equal": "equal degradation",
    **YARDSTICKS,
    "degradation": "degradation (nats)",
}
BEST = {"method": "method", "scale": "scale", "degradation": "degradation (nats)", **YARDSTICKS}
DEGRADATION = {"method": "method", "alpha": "α", "text": "text", "prompt": "prompt"}
VALUES = {
    "name": "value",
    "value": "balanced slope",
    "t": "t",
    "p": "p",
    "p_holm": "p, Holm",
    "p_bh": "p, Benjamini-Hochberg",
    "p_chance": "p, random adapters",
    "items": "items",
    "dilemmas": "dilemmas",
    "shared": "shared with the target",
    "agree": "same label there",
    "acquiescence": "acquiescence",
}
METHODS = {
    "method": "method",
    "equal": "equal degradation",
    "items": "items",
    "balanced_value": "balanced slope",
    "balanced_t": "t",
    "balanced_p": "p",
    "balanced_clustered": "clustered error",
    "balanced_paired": "paired error",
    "plain_value": "plain slope",
    "acquiescence_value": "acquiescence",
    "flips_towards_at_plus": "towards, +1",
    "flips_away_at_plus": "away, +1",
    "flips_towards_at_minus": "towards, -1",
    "flips_away_at_minus": "away, -1",
    "symmetry": "symmetry",
    "opposite": "opposite signs",
    "dose_monotonic": "monotonic values",
    "valid": "valid",
}
CLUSTERS = {
    "method": "method",
    "cluster": "cluster",
    "slope_less_1": "slope less 1",
    "rank": "rank",
    "values": "values",
}
PUBLISHED = {
    "method": "method",
    "once_negated_effect": "Effect, once negated",
    "published_effect": "Effect, published",
    "published_gain": "Gain, published",
    "steering_f1": "Steering F1",
    "steering_swapped": "poles swapped",
    "transfer": "transfer",
}


def shown(table: pd.DataFrame, titles: Mapping[str, str], *, digits: int = 3) -> str:
    """The named columns as an HTML table, under these titles; those that the table lacks are left out.

    A column that has a `_low` and a `_high` beside it (`value` has `low` and `high`) is shown as `0.69 [0.65, 0.73]`.

    Args:
        digits: After the point, in cells with an interval; of other numbers three are shown that count.
    """
    found = {title: _cells(table, name, digits) for name, title in titles.items() if name in table}
    return pd.DataFrame(found).to_html(index=False, border=0, na_rep="")


def _cells(table: pd.DataFrame, name: str, digits: int) -> pd.Series:
    bounds = [bound if name == "value" else f"{name.removesuffix('_value')}_{bound}" for bound in BOUNDS]
    if not set(bounds) <= set(table.columns):
        return table[name].map(_word)
    low, high = (table[bound] for bound in bounds)
    return pd.Series(
        [
            "" if pd.isna(each) else f"{each:.{digits}f} [{low[i]:.{digits}f}, {high[i]:.{digits}f}]"
            for i, each in table[name].items()
        ],
        index=table.index,
    )


def _word(value: object) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
