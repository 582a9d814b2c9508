"""Yardsticks, calibration and choice scoring, against models whose behaviour is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_adapter, tiny_model

import ipissa
from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation, Sampling, generate_ids
from ipissa.data.personas import Trait
from ipissa.errors import ConfigError, NotFiniteError, TrainingError
from ipissa.evaluate.dial import HookDial, ScaledDial
from ipissa.evaluate.held_out import HeldOut
from ipissa.evaluate.scoring import choice_scores, find_choices, score_choices
from ipissa.evaluate.yardsticks import (
    Estimate,
    PoleYardsticks,
    TraitSums,
    Yardsticks,
    bootstrap_ratio,
    measure_yardsticks,
    pole_preference,
    response_curve,
    trait_gain_above,
)
from ipissa.train import calibration
from ipissa.train.calibration import calibrate, distinct_share

TRAIT = Trait.from_words("kind", "angry")


def next_token_logprobs(model: Any, context: list[int], tokens: list[int]) -> torch.Tensor:
    """(tokens, vocab) of one continuation, alone and unpadded."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + tokens])).logits[0]
    return logits[len(context) - 1 : -1].log_softmax(-1)


def log_likelihood(model: Any, context: list[int], tokens: list[int]) -> float:
    """Of one continuation."""
    logprobs = next_token_logprobs(model, context, tokens)
    return float(sum(logprobs[i, token] for i, token in enumerate(tokens)))


def expected_log_likelihood(steered: Any, tokenizer: Any, c: Continuation, persona: int | None, alpha: float) -> float:
    """Of what the told model might have written at every token of a continuation."""
    told, context = (chat_ids(tokenizer, TRAIT.messages(c.prompt, p)) for p in (c.pole, persona))
    p = next_token_logprobs(steered.model, told, c.tokens).exp()
    with steered.alpha(alpha):
        logprobs = next_token_logprobs(steered.model, context, c.tokens)
    return float((p * logprobs).sum())


@pytest.fixture
def steered(tokenizer: Any) -> Any:
    model = tiny_model("llama", vocab_size=len(tokenizer))
    return ipissa.attach(model, random_adapter(model, suffixes=("o_proj",)))


@pytest.fixture
def continuations() -> list[Continuation]:
    generator = torch.Generator().manual_seed(0)
    return [
        Continuation(f"Prompt {i}", pole, torch.randint(100, 9000, (3 + i,), generator=generator).tolist())
        for i in range(4)
        for pole in (1, -1)
    ]


def test_response_and_preference_equal_their_definition(
    steered: Any, continuations: list[Continuation], tokenizer: Any
) -> None:
    def lp(pole: int, alpha: float) -> float:
        own = [c for c in continuations if c.pole == pole]
        total = sum(expected_log_likelihood(steered, tokenizer, c, None, alpha) for c in own)
        return total / sum(len(c.tokens) for c in own)

    curve = response_curve(steered, HeldOut(tokenizer, TRAIT, continuations), alphas=(-0.5, 1.0))
    assert [point.alpha for point in curve] == [-0.5, 0.0, 1.0]
    for point in curve:
        assert point.positive == pytest.approx(lp(1, point.alpha) - lp(1, 0), abs=1e-4)
        assert point.negative == pytest.approx(lp(-1, point.alpha) - lp(-1, 0), abs=1e-4)
    preference = pole_preference(steered, HeldOut(tokenizer, TRAIT, continuations))
    assert preference == pytest.approx(lp(1, 1) - lp(1, -1) + lp(-1, -1) - lp(-1, 1), abs=1e-4)


def test_the_shift_per_token_is_the_total_variation_of_what_was_written(steered: Any, tokenizer: Any) -> None:
    prompts = ["Hello there", "Why?"]
    sampling = Sampling(max_new_tokens=5)
    found = calibrate(steered, tokenizer, prompts, seed=0, sampling=sampling, grid=(0.05, 0.1))
    by_alpha = {point.alpha: point.variation for point in found.points}
    assert by_alpha[0.0] == 0
    assert 0 < by_alpha[0.05] < by_alpha[0.1] < 1
    contexts = [chat_ids(tokenizer, TRAIT.messages(prompt, None)) for prompt in prompts]
    with torch.random.fork_rng(), steered.alpha(0.1):
        torch.manual_seed(0)
        answers = generate_ids(steered.model, tokenizer, contexts, **sampling.settings())
    variations = []
    for context, answer in zip(contexts, answers, strict=True):
        p = []
        for alpha in (0.0, 0.1):
            with steered.alpha(alpha), torch.no_grad():
                logits = steered.model(input_ids=torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
            p.append(logits.softmax(-1))
        variations += ((p[0] - p[1]).abs().sum(-1) / 2).tolist()
    assert by_alpha[0.1] == pytest.approx(np.mean(variations), abs=1e-4)


def test_adapters_that_do_not_work_say_so() -> None:
    def pole(trait: float, t: float, plain: float) -> PoleYardsticks:
        gain = Estimate(trait, 0, 0, t)
        return PoleYardsticks(gain, Estimate(plain, 0, 0, 0), gain)

    def said(positive: PoleYardsticks, negative: PoleYardsticks, alpha_range: tuple[float, float] = (-1.0, 2.0)) -> str:
        return " ".join(Yardsticks(1.0, 100, positive, negative).shortcomings(alpha_range))

    assert said(pole(0.3, 4, 0.01), pole(0.2, 2.5, 0.02)) == ""
    assert "At α = -1 the trait gain is 0.10 (t 1.2)" in said(pole(0.3, 4, 0.01), pole(0.1, 1.2, 0.01))
    few = Yardsticks(1.0, 3, pole(0.3, 4.4, 0.01), pole(0.2, 4.2, 0.02))  # two degrees of freedom ask for 4.3
    assert few.shortcomings((-1, 1)) == [
        "At α = -1 the trait gain is 0.20 (t 4.2), which is not distinguishable from nothing."
    ]
    fewer = replace(
        few, prompts=12, positive=replace(few.positive, prompts=12), negative=replace(few.negative, prompts=3)
    )
    assert fewer.shortcomings((-1, 1)) == few.shortcomings((-1, 1))  # of the pole's own prompts, not of both poles'
    one_sided = said(pole(0.3, 4, 0.01), pole(0.2, 2.5, -0.02))
    assert one_sided.startswith("At α = -1 the pole's own texts are less likely than without steering")
    beyond = said(pole(0.3, 4, 0.01), pole(0.2, 2.5, 0.02), (-0.5, 2.0))
    assert beyond.startswith("Text holds together from -0.5 to +2 only, and what follows was measured at |α| = 1")
    saddle = said(pole(-0.3, -4, -0.2), pole(-0.2, -3, -0.1))
    assert saddle.startswith("Both poles make their own texts less likely")
    assert saddle.count("trait gain") == 2


def test_yardsticks_equal_their_definition(steered: Any, continuations: list[Continuation], tokenizer: Any) -> None:
    found = measure_yardsticks(steered, HeldOut(tokenizer, TRAIT, continuations), alpha=0.5)

    def lp(pole: int, persona: int | None, alpha: float) -> float:
        own = [c for c in continuations if c.pole == pole]
        total = sum(expected_log_likelihood(steered, tokenizer, c, persona, alpha) for c in own)
        return total / sum(len(c.tokens) for c in own)

    for pole, side in ((1, found.positive), (-1, found.negative)):
        a = 0.5 * pole
        trait = (lp(pole, 0, a) - lp(pole, 0, 0.0)) / (lp(pole, pole, 0.0) - lp(pole, 0, 0.0))
        contrast = (lp(pole, None, a) - lp(pole, None, -a)) / (lp(pole, pole, 0.0) - lp(pole, -pole, 0.0))
        assert side.trait_gain.value == pytest.approx(trait, rel=1e-3)
        assert side.plain_gain.value == pytest.approx(lp(pole, None, a) - lp(pole, None, 0.0), rel=1e-3)
        assert side.contrast.value == pytest.approx(contrast, rel=1e-3)


def test_what_the_unsteered_model_says_is_read_once_for_all_dials(
    steered: Any, continuations: list[Continuation], tokenizer: Any
) -> None:
    model, rows = steered.model, []
    model.register_forward_pre_hook(lambda *args: rows.append(len(args[2]["input_ids"])), with_kwargs=True)
    held_out = HeldOut(tokenizer, TRAIT, continuations)
    first = measure_yardsticks(steered, held_out)
    assert sum(rows) == 7 * len(continuations)
    rows.clear()
    halved = measure_yardsticks(ScaledDial(steered, 0.5), held_out)
    assert sum(rows) == 4 * len(continuations)  # being told, for what it might say, and what is steered
    afresh = measure_yardsticks(ScaledDial(steered, 0.5), HeldOut(tokenizer, TRAIT, continuations))
    for kept, read in ((halved.positive, afresh.positive), (halved.negative, afresh.negative)):
        for figure in ("trait_gain", "plain_gain", "contrast"):
            assert getattr(kept, figure).value == pytest.approx(getattr(read, figure).value, rel=1e-3)
    assert halved.positive.plain_gain.value != pytest.approx(first.positive.plain_gain.value, rel=0.1)


def test_expected_likelihood_is_the_mean_of_the_likelihood_of_drawn_tokens(steered: Any, tokenizer: Any) -> None:
    told, plain = (chat_ids(tokenizer, TRAIT.messages("Why?", persona)) for persona in (1, None))
    p = next_token_logprobs(steered.model, told, [0])[0].exp()
    drawn = torch.multinomial(p, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    before = next_token_logprobs(steered.model, plain, [0])[0]
    with steered.alpha(0.3):
        gains = (next_token_logprobs(steered.model, plain, [0])[0] - before)[drawn]
    texts = [Continuation("Why?", pole, [5]) for pole in (1, -1)]
    curve = response_curve(steered, HeldOut(tokenizer, TRAIT, texts), alphas=[0.3])
    at = {point.alpha: point.positive for point in curve}
    assert abs(gains.mean() - at[0.3]) < 4 * gains.std() / len(gains) ** 0.5
    assert gains.std() > 3 * abs(at[0.3])  # one drawn token says little


class Surer(HookDial):
    """Changes nothing but how sure the model is."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.hook(model.lm_head, self._sharpen)

    def _sharpen(self, module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.rows is None else logits * (1 + self.per_row(logits).abs())


def test_a_dial_that_only_makes_the_model_surer_has_no_trait_gain(tokenizer: Any) -> None:
    """Although likely texts become likelier, which likelihoods of texts drawn at a low temperature would reward."""
    dial = Surer(tiny_model("llama", vocab_size=len(tokenizer)))
    texts = []
    for prompt, pole in [("Why?", 1), ("Why?", -1), ("How?", 1), ("How?", -1)]:
        context = chat_ids(tokenizer, TRAIT.messages(prompt, pole))
        told = next_token_logprobs(dial.model, context, [0])[0]
        with dial.alpha(0.5):
            assert next_token_logprobs(dial.model, context, [0])[0].max() > told.max()
        texts.append(Continuation(prompt, pole, [int(told.argmax())]))
    found = measure_yardsticks(dial, HeldOut(tokenizer, TRAIT, texts), alpha=0.5)
    assert found.positive.trait_gain.value < 0
    assert found.negative.trait_gain.value < 0


def test_a_difference_is_surer_than_the_gains_where_prompts_are_hard_for_both() -> None:
    rng = np.random.default_rng(2)
    prompts, told = tuple("abcdefghij" * 6), rng.uniform(0.5, 1.5, 60)
    hard = rng.normal(0.6, 0.5, 60)
    ours, theirs = hard + 0.10 + rng.normal(0, 0.02, 60), hard + rng.normal(0, 0.02, 60)

    def side(steered: np.ndarray) -> PoleYardsticks:
        gain = bootstrap_ratio(steered, told, seed=0)
        return PoleYardsticks(gain, gain, gain, TraitSums(prompts, tuple(steered), tuple(told)))

    one, other = side(ours), side(theirs)
    found = trait_gain_above(one, other)
    assert found.value == pytest.approx(one.trait_gain.value - other.trait_gain.value)
    assert found.low > 0  # though the intervals of the gains overlap
    assert one.trait_gain.low < other.trait_gain.high
    with pytest.raises(ValueError, match="only where both were measured on the same ones"):
        trait_gain_above(one, PoleYardsticks(one.trait_gain, one.plain_gain, one.contrast))
    read = Yardsticks(1.0, 60, one, other)
    assert Yardsticks.from_dict(read.to_dict(by_prompt=True)) == read
    assert "by_prompt" not in read.to_dict()["positive"]


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        estimate = bootstrap_ratio(rng.normal(0.3, 1, 80), np.ones(80), seed=trial)
        hits += estimate.low <= 0.3 <= estimate.high
    assert 180 <= hits <= 198  # 95 % of 200, give or take three standard deviations


def test_t_is_that_of_a_one_sample_test() -> None:
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(1).normal(0.2, 1, 50)
    assert bootstrap_ratio(values, np.ones(50), seed=0).t == pytest.approx(ttest_1samp(values, 0).statistic)


def test_the_range_ends_before_the_first_alpha_at_which_text_falls_apart(steered: Any, tokenizer: Any) -> None:
    """Every grid point is read again here, and judged by the documented limits."""
    prompts, sampling, grid = ["Hello there", "Why?"], Sampling(max_new_tokens=5), (4.0, 0.05, 8.0)
    found = calibrate(steered, tokenizer, prompts, seed=0, sampling=sampling, grid=grid)
    assert (found.low, found.high) == (-0.05, 0.05)
    assert [point.alpha for point in found.points] == [-4.0, -0.05, 0.0, 0.05, 4.0]  # 8 needs no reading
    assert [point.holds for point in found.points] == [False, True, True, True, False]
    zero = found.points[2]
    for point in found.points:
        within = (
            point.base_nats <= zero.base_nats + 0.5 and point.distinct >= 0.9 * zero.distinct and point.variation <= 0.5
        )
        assert point.holds == within


def test_text_is_read_by_what_might_have_been_drawn_at_every_token(steered: Any, tokenizer: Any) -> None:
    """A slower reading: each answer alone, the nucleus by sorting, one token after the other."""
    prompts, sampling = ["Hello there", "Why?"], Sampling(max_new_tokens=6, temperature=0.7, top_p=0.6)
    found = calibrate(steered, tokenizer, prompts, seed=3, sampling=sampling, grid=(0.1,))
    contexts = [chat_ids(tokenizer, TRAIT.messages(prompt, None)) for prompt in prompts]

    def predictions(context: list[int], answer: list[int], alpha: float) -> torch.Tensor:
        with steered.alpha(alpha), torch.no_grad():
            logits = steered.model(input_ids=torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
        return logits.log_softmax(-1)

    def expected_nats(context: list[int], answer: list[int], alpha: float) -> float:
        total = 0.0
        steps = zip(*(predictions(context, answer, at) for at in (alpha, 0.0)), strict=True)
        for drawn_from, base in steps:
            p, order = (drawn_from / 0.7).softmax(-1).sort(descending=True)
            kept = int((p.cumsum(-1) < 0.6).sum()) + 1
            total -= float((p[:kept] / p[:kept].sum() * base[order[:kept]]).sum())
        return total

    for alpha, seeds in ((0.0, (3, 4, 5, 6)), (0.1, (3,)), (-0.1, (3,))):
        read = []
        for seed in seeds:
            with torch.random.fork_rng(), steered.alpha(alpha):
                torch.manual_seed(seed)
                answers = generate_ids(steered.model, tokenizer, contexts, **sampling.settings())
            read += [(expected_nats(c, a, alpha), len(a)) for c, a in zip(contexts, answers, strict=True)]
        nats, tokens = np.array(read).T
        (point,) = (point for point in found.points if point.alpha == alpha)
        mean = nats.sum() / tokens.sum()
        assert point.base_nats == pytest.approx(mean, abs=1e-4)
        assert point.error == pytest.approx(np.linalg.norm(nats - mean * tokens) / tokens.sum(), abs=1e-4)


def test_a_range_ends_where_nothing_can_be_drawn(
    steered: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read(model: Any, tokenizer: Any, contexts: Any, alpha: float, *_: Any) -> tuple[np.ndarray, ...]:
        if alpha >= 1:
            raise NotFiniteError("What the model predicts is not finite.")
        return np.ones(2), np.zeros(2), np.ones(2), np.ones(2)

    monkeypatch.setattr(calibration, "_read_draw", read)
    found = calibrate(steered, tokenizer, ["Why?"], seed=0, sampling=Sampling(), grid=(0.5, 1.0, 2.0))
    assert (found.low, found.high) == (-2.0, 0.5)
    assert [point.alpha for point in found.points] == [-2.0, -1.0, -0.5, 0.0, 0.5]
    assert "The range ends before α = +1: What the model predicts is not finite." in caplog.text


def test_a_model_whose_predictions_are_not_finite_writes_nothing(steered: Any, tokenizer: Any) -> None:
    head = steered.model.lm_head
    broken = head.register_forward_hook(lambda module, inputs, logits: logits * float("inf"))
    with pytest.raises(NotFiniteError, match=r"predicts in float32 is not finite; use --dtype bfloat16 or float32"):
        generate_ids(steered.model, tokenizer, [[1, 2]], **Sampling(max_new_tokens=5).settings())
    broken.remove()
    assert generate_ids(steered.model, tokenizer, [[1, 2]], **Sampling(max_new_tokens=5).settings())


def test_text_that_falls_apart_at_once_is_no_adapter(steered: Any, tokenizer: Any) -> None:
    with pytest.raises(TrainingError, match=r"falls apart already at \|α\| = 6"):
        calibrate(steered, tokenizer, ["Why?"], seed=0, sampling=Sampling(max_new_tokens=5), grid=(6.0,))


def test_repetition_lowers_the_distinct_share() -> None:
    assert distinct_share([1, 2, 3, 4, 5]) == 1
    assert distinct_share([1, 2] * 10) == pytest.approx(2 / 18)
    assert distinct_share([1]) == 1


def test_choices_match_exact_words_only(tokenizer: Any) -> None:
    for choice in find_choices(tokenizer, ["Yes", "No"]):
        texts = {tokenizer.decode(list(variant)).strip().lower() for variant in choice.variants}
        assert texts == {choice.text.lower()}
        assert len(choice.variants) >= 3
        assert all(len(variant) == 1 for variant in choice.variants)


def test_log_odds_and_mass_equal_sums_over_the_next_token_distribution(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    context = chat_ids(tokenizer, [{"role": "user", "content": "Is water wet? Yes or No."}], "My choice:")
    with torch.no_grad():
        p = model(input_ids=torch.tensor([context])).logits[0, -1].double().softmax(-1)
    words = [text.strip().lower() for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])]
    yes, no = (sum(float(p[i]) for i, each in enumerate(words) if each == word) for word in ("yes", "no"))
    choices = find_choices(tokenizer, ["Yes", "No"])
    (score,) = choice_scores(score_choices(model, tokenizer, context, choices, 1), choices)
    assert score.log_odds == pytest.approx(np.log(yes / no), abs=1e-3)
    assert score.choice_mass == pytest.approx(yes + no, abs=1e-4)


def test_choices_of_several_tokens_are_scored_as_sequences(tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=len(tokenizer))
    context, texts = [50, 60, 70], ["keep the wallet", "hand it in"]
    choices = find_choices(tokenizer, texts)
    (found,) = choice_scores(score_choices(model, tokenizer, context, choices, 1), choices)
    for text in texts:
        forms = {tuple(tokenizer.encode(form, add_special_tokens=False)) for form in (text, " " + text)}
        expected = np.logaddexp.reduce([log_likelihood(model, context, list(form)) for form in forms])
        assert found.logprobs[text] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("choices", "says"), [(["Yes"], "fewer than two"), (["Yes", " "], "empty answer"), (["Yes", "yes "], "twice")]
)
def test_unusable_choices_are_refused(tokenizer: Any, choices: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_choices(tokenizer, choices)
