"""Dilemmas asked at many α, on models whose behaviour is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_adapter, tiny_model
from odd_models import model_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ipissa.data.chat import chat_ids
from ipissa.data.datasets import load_items
from ipissa.data.items import CHOICES, PREFIX, Dataset, Item
from ipissa.data.personas import Trait
from ipissa.errors import ConfigError
from ipissa.evaluate.baselines.engineered import EngineeredTrait
from ipissa.evaluate.baselines.random import random_like
from ipissa.evaluate.choices import _check_answers, _row, complete, measure_choices
from ipissa.evaluate.dial import HookDial, ScaledDial
from ipissa.evaluate.scoring import find_choices, score_choices, score_contexts
from ipissa.evaluate.slopes import balanced_slope, plain_slope, with_labels
from ipissa.evaluate.steerer import Steerer
from ipissa.steering import attach

ALPHAS = (-1.0, 0.0, 1.0)
HONEST = "truthfully"


def yes_and_no(tokenizer: Any) -> tuple[list[int], list[int]]:
    yes, no = find_choices(tokenizer, CHOICES)
    return [v[0] for v in yes.variants], [v[0] for v in no.variants]


def test_a_choice_of_which_a_tokenizer_leaves_nothing_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1}, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace("\u200b", "")
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    forgetful = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ConfigError, match=r"The choice '\\u200b' is nothing"):
        find_choices(forgetful, ["yes", "\u200b"])


@pytest.fixture
def answering(tokenizer: Any) -> Iterator[Any]:
    """A tiny random model that always answers Yes or No."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    ids = [token for answers in yes_and_no(tokenizer) for token in answers]

    def prefer(module: Any, args: Any, logits: Tensor) -> Tensor:
        return logits.index_add(-1, torch.tensor(ids), torch.full((*logits.shape[:-1], len(ids)), 30.0))

    handle = model.lm_head.register_forward_hook(prefer)
    yield model
    handle.remove()


class KnownDial(HookDial):
    """Moves the log-odds of Yes by α times what `nats` says of each text."""

    def __init__(self, model: Any, tokenizer: Any, nats: Callable[[str], float]) -> None:
        super().__init__(model)
        self.yes, _ = yes_and_no(tokenizer)
        self.texts: list[str] = []
        self.hook(model.model.embed_tokens, self._read(tokenizer))
        self.hook(model.lm_head, self._move)
        self.nats = nats

    def _read(self, tokenizer: Any) -> Any:
        def read(module: Any, args: Any, output: Any) -> None:
            self.texts = tokenizer.batch_decode(args[0])

        return read

    def _move(self, module: Any, args: Any, logits: Tensor) -> Tensor:
        if self.rows is None:
            return logits
        shift = self.per_row(logits) * torch.tensor([self.nats(text) for text in self.texts]).view(-1, 1, 1)
        return logits.index_add(-1, torch.tensor(self.yes), shift.expand(*logits.shape[:-1], len(self.yes)))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Ten dilemmas, the honest action first in seven of them."""
    items = []
    for d in range(10):
        for side in (1, -1):
            label = side * (1 if d < 7 else -1)
            action = f"Answer {HONEST if label > 0 else 'falsely'} and go on, number {d}."
            items.append(Item(f"d{d}", side, f"Somebody asks you about matter {d}.", action, {"honesty": label}))
    return Dataset("made up", items, "honesty")


def labelled(rows: pd.DataFrame, dataset: Dataset) -> pd.DataFrame:
    return with_labels(rows, {i: item.labels["honesty"] for i, item in enumerate(dataset.items)})


def test_a_model_that_becomes_two_nats_more_honest_scores_two(answering: Any, tokenizer: Any, dataset: Dataset) -> None:
    dial = KnownDial(answering, tokenizer, lambda text: 2.0 if HONEST in text else -2.0)
    rows = labelled(measure_choices(Steerer(dial), tokenizer, dataset, ALPHAS), dataset)
    found = balanced_slope(rows)
    assert found.trait.value == pytest.approx(2, abs=1e-4)
    assert found.acquiescence.value == pytest.approx(0, abs=1e-4)
    assert plain_slope(rows).value == pytest.approx(2, abs=1e-4)
    assert plain_slope(rows, published=True).value == pytest.approx(0, abs=1e-4)
    dial.detach()


def test_a_model_that_says_yes_more_by_two_nats_scores_nothing(
    answering: Any, tokenizer: Any, dataset: Dataset
) -> None:
    dial = KnownDial(answering, tokenizer, lambda text: 2.0)
    rows = labelled(measure_choices(Steerer(dial), tokenizer, dataset, ALPHAS), dataset)
    found = balanced_slope(rows)
    assert found.trait.value == pytest.approx(0, abs=1e-4)
    assert found.acquiescence.value == pytest.approx(2, abs=1e-4)
    assert plain_slope(rows, published=True).value == pytest.approx(0.8, abs=1e-4)
    dial.detach()


def test_random_adapters_seldom_have_an_effect(answering: Any, tokenizer: Any) -> None:
    """The median of |t| over 20 seeds is below 2."""
    bundled = load_items(max_items=40)
    adapter = random_adapter(answering, suffixes=("o_proj", "down_proj"))
    ts = []
    for seed in range(20):
        steered = attach(answering, random_like(adapter, answering, seed=seed))
        rows = measure_choices(Steerer(steered), tokenizer, bundled, ALPHAS, rows_per_batch=96)
        ts.append(abs(balanced_slope(labelled(rows, bundled)).trait.t))
        steered.detach()
    assert max(ts) > 0
    assert np.median(ts) < 2


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("suffixes", [("layers.2.mlp.down_proj",), ("layers.0.self_attn.q_proj", "lm_head")])
def test_many_alpha_in_one_pass_equal_one_by_one(family: str, suffixes: tuple[str, ...], tokenizer: Any) -> None:
    """Whether the layers before the first adapted one are shared, or nothing is because lm_head is adapted."""
    model = tiny_model(family, vocab_size=len(tokenizer))
    steered = attach(model, random_adapter(model, suffixes=suffixes))
    choices = find_choices(tokenizer, CHOICES)
    contexts = [tokenizer.encode(text) for text in ("My choice:", "A much longer question? My choice:", "So:", "Well")]
    alphas = (-0.7, 0.0, 0.4)
    found = score_contexts(steered, tokenizer, contexts, choices, alphas, rows_per_batch=7)
    for i, context in enumerate(contexts):
        for j, alpha in enumerate(alphas):
            with steered.alpha(alpha):
                expected = score_choices(model, tokenizer, context, choices, 1)[0]
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([context])).logits[0, -1]
            assert (found.choices[i, j] - expected).abs().max() < 1e-4
            assert found.likeliest[i, j] == pytest.approx(logits.log_softmax(-1).max().item(), abs=1e-4)
    assert (found.choices[:, 0] - found.choices[:, 2]).abs().max() > 1e-2
    steered.detach()


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n_text"])
def test_layers_that_read_more_than_hidden_states_are_given_it_for_every_alpha(kind: str, tokenizer: Any) -> None:
    """Gemma 4's read what its tokens are; Gemma 3n's the keys of others, and states of another shape."""
    model = model_of(kind, vocab_size=len(tokenizer))
    (name,) = (name for name, _ in model.named_modules() if name.endswith("layers.2.self_attn.o_proj"))
    steered = attach(model, random_adapter(model, suffixes=(name,)))
    choices, context, alphas = find_choices(tokenizer, CHOICES), tokenizer.encode("My choice:"), (-0.7, 0.0, 0.4)
    found = score_contexts(steered, tokenizer, [context, context[1:]], choices, alphas).choices[0]
    for alpha, scores in zip(alphas, found, strict=True):
        with steered.alpha(alpha):
            assert (scores - score_choices(model, tokenizer, context, choices, 1)[0]).abs().max() < 1e-4
    assert (found[0] - found[2]).abs().max() > 1e-3


def test_layers_before_the_first_adapted_one_see_every_text_once(tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=len(tokenizer))
    steered = attach(model, random_adapter(model, suffixes=("layers.2.mlp.down_proj",)))
    seen: dict[int, list[int]] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, args, i=index: seen.setdefault(i, []).append(len(args[0])))
    contexts = [[5, 6, 7]] * 4
    score_contexts(steered, tokenizer, contexts, find_choices(tokenizer, CHOICES), (-1.0, 0.0, 1.0), rows_per_batch=12)
    assert seen == {0: [4], 1: [4], 2: [12], 3: [12]}


def test_choices_of_several_tokens_are_scored_at_many_alpha(tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=len(tokenizer))
    steered = attach(model, random_adapter(model, suffixes=("layers.3.self_attn.o_proj",)))
    choices = find_choices(tokenizer, ["keep the wallet", "hand it in"])
    contexts = [[50, 60, 70], [80, 90]]
    found = score_contexts(steered, tokenizer, contexts, choices, (0.0, 0.8)).choices
    with steered.alpha(0.8):
        for i, context in enumerate(contexts):
            assert (found[i, 1] - score_choices(model, tokenizer, context, choices, 1)[0]).abs().max() < 1e-4
    steered.detach()


def test_log_odds_are_those_of_the_question_as_it_is_asked(answering: Any, tokenizer: Any, dataset: Dataset) -> None:
    rows = measure_choices(Steerer(HookDial(answering)), tokenizer, dataset, [0.0])
    item = dataset.items[3]
    context = chat_ids(tokenizer, [{"role": "user", "content": item.question()}], PREFIX)
    with torch.no_grad():
        p = answering(input_ids=torch.tensor([context])).logits[0, -1].double().softmax(-1)
    yes, no = (float(p[ids].sum()) for ids in yes_and_no(tokenizer))
    row = rows[rows["item"] == 3].iloc[0]
    assert row["log_odds"] == pytest.approx(np.log(yes / no), abs=1e-4)
    assert row["choice_mass"] == pytest.approx(yes + no, abs=1e-4)
    assert (row["dilemma"], row["side"], row["valid"]) == ("d1", -1, True)


@pytest.mark.parametrize("kind", [Trait, EngineeredTrait])
def test_told_personas_are_measured_at_both_poles_and_are_the_plain_model_at_zero(
    answering: Any, tokenizer: Any, dataset: Dataset, kind: type[Trait]
) -> None:
    trait = kind(**asdict(Trait.from_words("honest", "dishonest")))
    told = measure_choices(Steerer(HookDial(answering), told=trait), tokenizer, dataset, (-1, -0.5, 0, 0.5, 1))
    plain = measure_choices(Steerer(HookDial(answering)), tokenizer, dataset, [0.0])
    assert sorted(told["alpha"].unique()) == [-1, 0, 1]
    at_zero = told[told["alpha"] == 0].reset_index(drop=True)
    assert at_zero["log_odds"].to_numpy() == pytest.approx(plain["log_odds"].to_numpy(), abs=1e-4)
    context = chat_ids(tokenizer, trait.messages(dataset.items[0].question(), 1), PREFIX)
    yes, no = score_choices(answering, tokenizer, context, find_choices(tokenizer, CHOICES), 1)[0].tolist()
    row = told[(told["item"] == 0) & (told["alpha"] == 1)].iloc[0]
    assert row["log_odds"] == pytest.approx(yes - no, abs=1e-4)


def test_a_model_that_never_says_yes_or_no_gets_a_sentence(tokenizer: Any, dataset: Dataset) -> None:
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.lm_head.register_forward_hook(lambda _, args, logits: logits.index_fill(-1, torch.tensor([5]), 60.0))
    with pytest.raises(ConfigError, match="answers neither Yes nor No"):
        measure_choices(Steerer(HookDial(model)), tokenizer, dataset, [0.0])


@pytest.mark.parametrize(("share", "valid"), [(0.0101, True), (0.0099, False)])
def test_an_answer_counts_from_a_hundredth_of_the_likeliest_token_on(
    share: float, valid: bool, dataset: Dataset
) -> None:
    likeliest = math.log(0.5)
    row = _row(0, dataset, 0.0, [likeliest + math.log(share * 0.8), likeliest + math.log(share * 0.2)], likeliest)
    assert row["valid"] is valid
    assert row["choice_mass"] == pytest.approx(0.5 * share)
    assert row["log_odds"] == pytest.approx(math.log(4)) if valid else math.isnan(row["log_odds"])


def test_a_model_must_answer_half_of_the_items() -> None:
    rows = pd.DataFrame({"alpha": 0.0, "choice_mass": 0.1, "valid": [True] * 5 + [False] * 5})
    _check_answers(rows)
    with pytest.raises(ConfigError, match="only 40% of items can be scored"):
        _check_answers(rows.assign(valid=[True] * 4 + [False] * 6))


def test_items_without_an_answer_at_some_alpha_are_left_out_at_all_of_them(
    answering: Any, tokenizer: Any, dataset: Dataset
) -> None:
    class Silenced(KnownDial):
        """At α = 1 texts about matter 4 are answered by another word."""

        def _move(self, module: Any, args: Any, logits: Tensor) -> Tensor:
            if self.rows is None:
                return logits
            silent = torch.tensor(["matter 4" in text for text in self.texts]) & (self.rows > 0)
            return torch.where(silent.view(-1, 1, 1), torch.zeros_like(logits).index_fill(-1, torch.tensor([5]), 60.0),
                               logits)  # fmt: skip

    dial = Silenced(answering, tokenizer, lambda text: 0.0)
    rows = measure_choices(Steerer(dial), tokenizer, dataset, ALPHAS)
    assert rows[~rows["valid"]]["log_odds"].isna().all()
    assert sorted(rows[~rows["valid"]]["item"].unique()) == [8, 9]
    assert sorted(complete(rows)["item"].unique()) == [i for i in range(20) if i not in (8, 9)]
    assert complete(rows)["log_odds"].notna().all()
    one_side = rows.assign(valid=rows["valid"] | (rows["item"] == 9))
    assert complete(one_side).equals(complete(rows))  # no side of a dilemma without the other
    dial.detach()


def test_a_scaled_dial_turns_another_that_much_further(llama: Any) -> None:
    steered = attach(llama, random_adapter(llama))
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        with steered.alpha([0.6, -0.3]):
            expected = llama(input_ids=ids).logits
        with ScaledDial(steered, 3.0).alpha([0.2, -0.1]):
            assert (llama(input_ids=ids).logits - expected).abs().max() < 1e-5
