"""Texts that repeat the persona line, and what the trait gain is without them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ipissa.adapter import load_adapter
from ipissa.data.continuations import Continuation
from ipissa.data.personas import Trait
from ipissa.evaluate.compare import Measured
from ipissa.evaluate.echoes import Echoes, find_echoes, trait_gain_without
from ipissa.evaluate.report.page import Findings, write_report
from ipissa.evaluate.settings import EvalSettings
from ipissa.evaluate.yardsticks import PoleYardsticks, TraitSums, bootstrap_ratio


def test_a_text_that_holds_a_persona_line_is_an_echo_of_its_own_pole(tokenizer: Any) -> None:
    said = [
        ("a toy", 1, "Well.\nPRETEND you're a kind  person. Which toy?"),
        ("a cake", -1, "So: Pretend you're a kind person."),  # the other pole's line, in a text of this one
        ("a dog", -1, "Pretend you're a person. Woof."),
        ("a cat", 1, "I pretend to be a kind person."),
        ("a toy", 1, "Pretend you're an angry person."),
    ]
    texts = [Continuation(prompt, pole, tokenizer.encode(text)) for prompt, pole, text in said]
    assert find_echoes(texts, tokenizer, Trait.from_words("kind", "angry")) == {
        "+": ["a toy"],
        "-": ["a cake", "a dog"],
    }


SUMS = TraitSums(("a", "b", "c", "d"), steered=(1.0, 2.0, 9.0, 0.5), told=(2.0, 3.0, 10.0, 1.5))


def pole(sums: TraitSums | None, measured: Measured) -> PoleYardsticks:
    found = replace(measured.yardsticks.negative, by_prompt=sums)
    if sums is None:
        return found
    return replace(found, trait_gain=bootstrap_ratio(np.array(sums.steered), np.array(sums.told), seed=0))


def test_without_echoes_is_the_ratio_of_sums_over_the_other_prompts(measured: list[Measured]) -> None:
    whole = pole(SUMS, measured[0])
    found = trait_gain_without(whole, ["c", "another"])
    assert found.value == pytest.approx(3.5 / 6.5)
    assert 1 / 3 <= found.low <= found.value <= found.high <= 2 / 3  # the least and the most of one prompt
    assert trait_gain_without(whole, []) == whole.trait_gain
    assert math.isnan(trait_gain_without(whole, ["a", "b", "c"]).value)
    with pytest.raises(ValueError, match="what each of them contributes"):
        trait_gain_without(pole(None, measured[0]), ["c"])


def test_the_report_names_echoes_and_has_every_method_without_them(
    home: Path, measured: list[Measured], tmp_path: Path
) -> None:
    adapter = load_adapter(home / "honest.safetensors")
    some = [replace(each, yardsticks=replace(each.yardsticks, negative=pole(SUMS, each))) for each in measured]

    def written(name: str, negative: list[str]) -> tuple[str, pd.DataFrame]:
        echoes: Echoes = {"+": [], "-": negative}
        findings = Findings(EvalSettings(), adapter, None, some, best=[], tuning=24, texts=[], echoes=echoes, null=None)
        write_report(findings, tmp_path / name)
        table = pd.read_csv(tmp_path / name / "tables" / "yardsticks.csv")
        return (tmp_path / name / "report.html").read_text(), table.set_index(["pole", "method"])

    page, table = written("one", ["c"])
    assert "1 of the texts at - repeats\nthe persona line itself (about: c)" in page
    assert "<th>without echoes</th>" in page
    assert table.loc["-", "without_echoes"].tolist() == pytest.approx([3.5 / 6.5] * len(some))
    assert table.loc["-", "trait_gain"].tolist() == pytest.approx([12.5 / 16.5] * len(some))
    assert table.loc["+", "without_echoes"].tolist() == table.loc["+", "trait_gain"].tolist()
    page, table = written("none", [])
    assert "without echoes" not in page
    assert table["without_echoes"].tolist() == table["trait_gain"].tolist()
