"""The README's results say what the medians in docs/results say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.results import BEGIN, END, SHOWN, section, with_results

README = f"# ipissa\n\n{BEGIN}\n\nof last year\n\n{END}\n\nRead on."


def medians(t: tuple[float, float, float], **worse_gains: float) -> pd.DataFrame:
    """Three methods with a trait gain of 0.5 at + and another at -, and a t of some slope at three seeds."""
    rows = []
    for method, gain in worse_gains.items():
        for figure in (*SHOWN, "balanced_t"):
            low, median, high = t if figure == "balanced_t" else (gain - 0.1, gain, gain + 0.1)
            if figure == "trait_gain +":
                low, median, high = 0.4, 0.5, 0.6
            rows.append([method, figure, median, low, high, 3])
    return pd.DataFrame(rows, columns=["method", "figure", "median", "lowest", "highest", "seeds"])


def test_every_method_has_a_row_and_those_ahead_are_named() -> None:
    text = section("kind", medians((2.5, 3, 4), adapter=0.3, prompt=1.0, caa=0.1, lora=0.4))
    assert "| **kind** | 0.50 [0.40, 0.60] | 0.30 [0.20, 0.40] |" in text
    assert "| caa | 0.50 [0.40, 0.60] | 0.10 [0.00, 0.20] |" in text
    assert "more trait gain at the worse pole than `kind`: `lora`." in text  # a prompt has no scale
    assert "medians over 3 seeds" in text
    first = section("kind", medians((2.5, 3, 4), adapter=0.3, caa=0.1))
    assert "than `kind`: no other method." in first


@pytest.mark.parametrize(
    ("t", "says"),
    [((2.5, 3, 4), "is dist"), ((-4, -3, -2.5), "is dist"), ((1.5, 3, 4), "is not"), ((-4, 3, 4), "is not")],
)
def test_an_effect_on_choices_is_claimed_only_if_every_seed_has_it(t: tuple[float, float, float], says: str) -> None:
    assert f"nats per α) {says}" in section("kind", medians(t, adapter=0.3))


def test_the_readme_keeps_everything_but_its_results(tmp_path: Path) -> None:
    (tmp_path / "kind").mkdir()
    medians((2.5, 3, 4), adapter=0.3).to_csv(tmp_path / "kind" / "medians.csv", index=False)
    text = with_results(README, tmp_path)
    assert text.startswith("# ipissa\n")
    assert text.endswith("\n\nRead on.")
    assert "of last year" not in text
    assert "**`kind`**" in text
    assert with_results(text, tmp_path) == text
