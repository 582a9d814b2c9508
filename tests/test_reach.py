"""How far a dial can reach between two personas, against the definition and against a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from typer.testing import CliRunner

from ipissa.cli import app
from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation
from ipissa.data.personas import Trait
from ipissa.data.prompts import spread
from ipissa.errors import ConfigError, TrainingError
from ipissa.models import load_model
from ipissa.train import elicitation as elicitation_module
from ipissa.train.elicitation import elicitation
from ipissa.train.reach import Reach, check_reach, measure_reach
from ipissa.train.words import split_pair

TRAIT = Trait.from_words("kind", "angry")


def reach_of(plus: np.ndarray, minus: np.ndarray) -> Reach:
    """The reach of two effects, given as vectors whose squared lengths are twice the divergences."""
    return Reach(plus @ plus / 2, minus @ minus / 2, (plus - minus) @ (plus - minus) / 2)


@pytest.mark.parametrize(
    ("plus", "minus", "expected"),
    [
        ([2.0, 0.0], [-2.0, 0.0], 1.0),  # opposite
        ([3.0, 0.0], [-1.0, 0.0], 1 - 4 / 16),  # opposite, of unequal strength
        ([2.0, 0.0], [0.0, 2.0], 0.5),  # unrelated
        ([2.0, 0.0], [2.0, 0.0], 0.0),  # the same
    ],
)
def test_reach_of_opposite_unrelated_and_equal_personas(plus: list, minus: list, expected: float) -> None:
    assert reach_of(np.array(plus), np.array(minus)).odd == pytest.approx(expected)


def test_reach_is_the_best_that_any_odd_dial_does_at_its_worse_pole() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        plus, minus = rng.normal(size=5), rng.normal(size=5)

        def worse_gain(w: float, plus: np.ndarray = plus, minus: np.ndarray = minus) -> float:
            g = plus + w * (-minus - plus)  # the best g for any pair of weights lies on this line
            gains = [1 - ((t - s * g) @ (t - s * g)) / (t @ t) for s, t in ((1, plus), (-1, minus))]
            return -min(gains)

        best = -minimize_scalar(worse_gain, bounds=(0, 1), method="bounded", options={"xatol": 1e-9}).fun
        assert reach_of(plus, minus).odd == pytest.approx(best, abs=1e-6)


def test_measured_divergences_equal_their_definition_text_by_text(tiny: Path) -> None:
    model, tokenizer = load_model(str(tiny / "model"), device="cpu", dtype="float32")
    texts = [
        Continuation("Hello there.", 1, [5, 6, 7, 8]),
        Continuation("Hello there.", -1, [9, 10, 11]),
        Continuation("What is two?", 1, [12, 13]),
        Continuation("What is two?", -1, [14, 15, 16, 17, 18]),
    ]

    def divergence(own: int, other: int) -> float:
        total, count = 0.0, 0
        for c in (c for c in texts if c.pole == own):
            logprobs = []
            for persona in (own, other):
                context = chat_ids(tokenizer, TRAIT.messages(c.prompt, persona))
                logits = model(torch.tensor([context + c.tokens])).logits[0, len(context) - 1 : -1]
                logprobs.append(logits.double().log_softmax(-1))
            total += float((logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum())
            count += len(c.tokens)
        return total / count

    with torch.no_grad():
        expected = (divergence(1, 0), divergence(-1, 0), (divergence(1, -1) + divergence(-1, 1)) / 2)
    found = measure_reach(model, tokenizer, TRAIT, texts)
    assert (found.positive, found.negative, found.apart) == pytest.approx(expected, abs=1e-6)


def test_a_short_reach_is_said_and_a_long_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    check_reach(Reach(0.1, 0.1, 0.38), TRAIT)
    assert not caplog.records
    check_reach(Reach(0.1, 0.1, 0.02), TRAIT)
    assert "'a kind' and 'an angry'" in caplog.text
    assert "is low, 5 %" in caplog.text


def test_personas_that_elicit_nothing_are_refused() -> None:
    check_reach(Reach(0.1, 0.1, 0.38), TRAIT)
    with pytest.raises(TrainingError, match="Told to be an angry person, this model says nearly what it says untold"):
        check_reach(Reach(0.1, 0.0001, 0.1), TRAIT)


@pytest.mark.parametrize(("apart", "warned"), [(0.5, False), (0.02, True)])
def test_personas_that_answer_alike_are_warned_of(
    apart: float, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Opposite ones by `apart` in every dilemma, which is Yes in half of them: their averages are equal."""
    asked: list[str] = []

    def odds(model: Any, tokenizer: Any, messages: Any, choices: Any, *, rows: int) -> Any:
        text = messages[-1]["content"]
        asked.append(text)
        pole = 1 if "a kind" in text else -1 if "an angry" in text else 0
        sign = 1 if len(asked) % 2 else -1  # six dilemmas, asked in the same order under every persona
        return torch.tensor([[sign * pole * apart / 2, 0.0]])

    monkeypatch.setattr(elicitation_module, "chat_ids", lambda tokenizer, messages, prefill: messages)
    monkeypatch.setattr(elicitation_module, "find_choices", lambda tokenizer, choices: choices)
    monkeypatch.setattr(elicitation_module, "score_choices", odds)
    found = elicitation(None, None, TRAIT)
    assert found.span == pytest.approx(apart)
    assert found.neutral == found.plain == 0
    assert (f"their log-odds are {apart:.2f} nats apart" in caplog.text) is warned


def test_words_are_compared_on_the_command_line(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Tell me about the number {i}." for i in range(12)))
    result = CliRunner().invoke(
        app,
        [
            *("words", "kind / angry", "long, wordy/short", "--model", str(tiny / "model")),
            *("--prompts", str(prompts), "--device", "cpu", "--max-prompts", "3"),
        ],
    )
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["kind / angry", "long, wordy / short"]


@pytest.mark.parametrize("text", ["kind", "kind/", "a/b/c"])
def test_pairs_that_are_not_pairs_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="with a slash between"):
        split_pair(text)


def test_spread_takes_prompts_from_every_part() -> None:
    assert spread(list("abcdefghij"), 3) == ["a", "d", "g"]
    assert spread(["a", "b"], 5) == ["a", "b"]
