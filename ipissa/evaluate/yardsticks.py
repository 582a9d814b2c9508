"""Three yardsticks of a steering adapter that breaking text or saying Yes cannot satisfy.

lp_s(k, α) is the mean log-likelihood per token, in nats, of what the base model writes about held-out
prompts under the persona of pole s, given context k (none, neutral persona 0, persona s) and steered
at α. With a_s = +α at the positive pole and -α at the negative:

    trait gain  [lp_s(0, a_s) - lp_s(0, 0)] / [lp_s(s, 0) - lp_s(0, 0)]
                the part of the persona prompt's own trait effect that steering recovers; 1 is as
                good as being told, breaking text or inverting the sign makes it negative
    plain gain  lp_s(none, a_s) - lp_s(none, 0), in nats: what a user without personas gets
    contrast    [lp_s(none, a_s) - lp_s(none, -a_s)] / [lp_s(s, 0) - lp_s(-s, 0)]
                easily gamed by breaking text at the other pole, so never quoted alone

Texts are drawn from the whole distribution of the told model (`Sampling.whole`), and at every token of a
text the log-likelihood is averaged over what the told model might write next, p_s, not read off the one
token that was drawn:

    lp_s(k, α) = mean over tokens t of Σ_v p_s(v | text so far) log p(v | k, text so far; α)

which has the same mean and a fraction of the variance (Rao-Blackwell). Being told is then the most that any
dial can reach, by Gibbs' inequality, and the trait gain is the part of KL(told || neutral) that steering
removes. Texts drawn at a temperature below 1 break this: a dial that only makes the model surer gains there.

Intervals are 95 % percentile bootstraps over prompts, the unit that was held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ipissa.data.chat import chat_ids
from ipissa.data.continuations import Continuation
from ipissa.data.personas import Trait
from ipissa.evaluate.dial import Dial
from ipissa.evaluate.response import symmetry
from ipissa.sequences import continuation_logprobs, pad_batch

ROWS_PER_BATCH = 32
LEAST_LOGPROB = -1e4
RESAMPLES = 2000
MIN_T = 2.0
RESPONSE_ALPHAS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, and t = figure / standard error of its numerator."""

    value: float
    low: float
    high: float
    t: float


@dataclass(frozen=True)
class PoleYardsticks:
    """The yardsticks of one pole, at |α| = `alpha`."""

    trait_gain: Estimate
    plain_gain: Estimate
    contrast: Estimate


@dataclass(frozen=True)
class Yardsticks:
    """What steering at ±α does to held-out text of both poles."""

    alpha: float
    prompts: int
    positive: PoleYardsticks
    negative: PoleYardsticks

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Yardsticks:
        """What `to_dict` gave."""

        def pole(name: str) -> PoleYardsticks:
            return PoleYardsticks(**{figure: Estimate(**each) for figure, each in values[name].items()})

        return cls(values["alpha"], values["prompts"], positive=pole("positive"), negative=pole("negative"))

    def shortcomings(self) -> list[str]:
        """What a user must know before relying on the adapter, one sentence each; empty if it works."""
        found = []
        poles = {"+": self.positive, "-": self.negative}
        if all(pole.plain_gain.value <= 0 for pole in poles.values()):
            found.append("Both poles make their own texts less likely than no steering does: it only breaks text.")
        for sign, pole in poles.items():
            gain = pole.trait_gain
            if gain.value <= 0 or gain.t < MIN_T:
                found.append(
                    f"At α = {sign}{self.alpha:g} the trait gain is {gain.value:.2f} (t {gain.t:.1f}), "
                    "which is not distinguishable from nothing."
                )
        return found


@dataclass(frozen=True)
class _Setting:
    """One way to read a continuation: under which persona (None: plain), told how, and at which signed α."""

    persona: int | None
    alpha: float
    told_by: Trait | None = None  # None: as the trait that is measured


def measure_yardsticks(
    steered: Dial,
    tokenizer: Any,
    trait: Trait,
    continuations: Sequence[Continuation],
    *,
    alpha: float = 1.0,
    seed: int = 0,
) -> Yardsticks:
    """Measure a dial on held-out continuations of both poles."""

    def settings(pole: int) -> dict[str, _Setting]:
        return {
            **_references(pole),
            "neutral_steered": _Setting(0, pole * alpha),
            "plain_steered": _Setting(None, pole * alpha),
            "plain_opposite": _Setting(None, -pole * alpha),
        }

    return _measure(steered, tokenizer, trait, continuations, settings, alpha=alpha, seed=seed)


def measure_persona_prompt(
    dial: Dial,
    tokenizer: Any,
    trait: Trait,
    continuations: Sequence[Continuation],
    *,
    told_by: Trait | None = None,
    seed: int = 0,
) -> Yardsticks:
    """The same yardsticks of telling the model.

    Told by the trait itself, gain and contrast are 1 by definition, and the plain gain is measured. `told_by`
    tells it in other words.
    """
    words = None if told_by == trait else told_by

    def settings(pole: int) -> dict[str, _Setting]:
        told = {"neutral_steered": pole, "plain_steered": pole, "plain_opposite": -pole}
        return _references(pole) | {name: _Setting(persona, 0.0, words) for name, persona in told.items()}

    return _measure(dial, tokenizer, trait, continuations, settings, alpha=1.0, seed=seed)


def _references(pole: int) -> dict[str, _Setting]:
    """What the base model says, told and untold."""
    return {
        "neutral": _Setting(0, 0.0),
        "told": _Setting(pole, 0.0),
        "told_opposite": _Setting(-pole, 0.0),
        "plain": _Setting(None, 0.0),
    }


def _measure(
    dial: Dial,
    tokenizer: Any,
    trait: Trait,
    continuations: Sequence[Continuation],
    settings: Callable[[int], dict[str, _Setting]],
    *,
    alpha: float,
    seed: int,
) -> Yardsticks:
    prompts = sorted({c.prompt for c in continuations})
    poles = {}
    for pole in (1, -1):
        own = [c for c in continuations if c.pole == pole]
        label = f"yardsticks {'+' if pole > 0 else '-'}"
        lp = _log_likelihoods(dial, tokenizer, trait, own, settings(pole), label=label)
        poles[pole] = _pole_yardsticks(lp, own, prompts, seed=seed)
    return Yardsticks(alpha=alpha, prompts=len(prompts), positive=poles[1], negative=poles[-1])


@dataclass(frozen=True)
class ResponsePoint:
    """What one α does to texts of either pole, in nats per token against α = 0, without personas."""

    alpha: float
    positive: float
    negative: float


def response_symmetry(response: Sequence[ResponsePoint]) -> float:
    """How alike the two poles act, from 0 (one does nothing, or both do the same) to 1 (opposite and as strong).

    With y(α) the nats per token that texts of the positive pole gain over those of the negative: the smaller of
    |y(1)| and |y(-1)| over the larger, and 0 if both have one sign.
    """
    y = {point.alpha: point.positive - point.negative for point in response}
    found = symmetry(y[-1.0], 0.0, y[1.0])
    return found.share if found.opposite else 0.0


def response_curve(
    steered: Dial,
    tokenizer: Any,
    trait: Trait,
    continuations: Sequence[Continuation],
    *,
    alphas: Sequence[float] = RESPONSE_ALPHAS,
) -> list[ResponsePoint]:
    """How held-out texts of both poles become likelier or less likely as the dial turns."""
    gains = {}
    for pole in (1, -1):
        own = [c for c in continuations if c.pole == pole]
        settings = {f"{alpha:g}": _Setting(None, alpha) for alpha in sorted({0.0, *alphas})}
        label = f"response {'+' if pole > 0 else '-'}"
        lp = _log_likelihoods(steered, tokenizer, trait, own, settings, label=label)
        tokens = sum(len(c.tokens) for c in own)
        gains[pole] = {name: float((sums - lp["0"]).sum() / tokens) for name, sums in lp.items()}
    return [ResponsePoint(float(name), gains[1][name], gains[-1][name]) for name in gains[1]]


def pole_preference(steered: Dial, tokenizer: Any, trait: Trait, continuations: Sequence[Continuation]) -> float:
    """Nats per token by which texts of each pole are likelier at their own α = ±1 than at the other."""
    total = 0.0
    for pole in (1, -1):
        own = [c for c in continuations if c.pole == pole]
        settings = {"own": _Setting(None, pole), "other": _Setting(None, -pole)}
        lp = _log_likelihoods(steered, tokenizer, trait, own, settings, label=f"sign {'+' if pole > 0 else '-'}")
        total += (lp["own"].sum() - lp["other"].sum()) / sum(len(c.tokens) for c in own)
    return total


@torch.no_grad()
def _log_likelihoods(
    dial: Dial,
    tokenizer: Any,
    trait: Trait,
    continuations: Sequence[Continuation],
    settings: dict[str, _Setting],
    *,
    label: str,
) -> dict[str, np.ndarray]:
    """Expected log-likelihood of every continuation of one pole, summed over its tokens, in every setting.

    Equal settings are read once, and all settings of a text in one batch, as their expectation is over
    the same next tokens.
    """
    told = _Setting(continuations[0].pole, 0.0)
    distinct = list(dict.fromkeys([told, *settings.values()]))
    sums = {setting: np.zeros(len(continuations)) for setting in distinct}
    per_batch = max(1, ROWS_PER_BATCH // len(distinct))
    for start in tqdm(range(0, len(continuations), per_batch), desc=label, unit="batch"):
        texts = continuations[start : start + per_batch]
        expected = _expected_sums(dial, tokenizer, trait, texts, distinct)
        for setting, column in zip(distinct, expected.T, strict=True):
            sums[setting][start : start + per_batch] = column
    return {name: sums[setting] for name, setting in settings.items()}


def _expected_sums(
    dial: Dial, tokenizer: Any, trait: Trait, texts: Sequence[Continuation], settings: Sequence[_Setting]
) -> np.ndarray:
    """(texts, settings): Σ_t Σ_v p_told(v) log p_setting(v), where the first setting is being told."""
    read = [(c, setting) for c in texts for setting in settings]
    batch = pad_batch(
        [chat_ids(tokenizer, (setting.told_by or trait).messages(c.prompt, setting.persona)) for c, setting in read],
        [c.tokens for c, _ in read],
        pad_id=tokenizer.pad_token_id,
        device=dial.model.device,
    )
    with dial.alpha([setting.alpha for _, setting in read]):
        logprobs = continuation_logprobs(dial.model, batch)
    logprobs.clamp_(min=LEAST_LOGPROB)  # so that 0 · -inf, for tokens a model cannot say, is 0
    logprobs = logprobs.unflatten(0, (len(texts), -1))  # (texts, settings, tokens, vocab)
    expected = torch.einsum("xtv,xstv->xst", logprobs[:, 0].exp(), logprobs)
    mask = batch.mask.unflatten(0, (len(texts), -1))
    return (expected * mask).sum(-1).double().cpu().numpy()


def _pole_yardsticks(
    lp: dict[str, np.ndarray], continuations: Sequence[Continuation], prompts: list[str], *, seed: int
) -> PoleYardsticks:
    tokens = np.array([len(c.tokens) for c in continuations], dtype=float)
    row_of = {prompt: i for i, prompt in enumerate(prompts)}
    cluster = np.array([row_of[c.prompt] for c in continuations])

    def per_prompt(values: np.ndarray) -> np.ndarray:
        return np.bincount(cluster, weights=values, minlength=len(prompts))

    n = per_prompt(tokens)

    def estimate(up: np.ndarray, over: np.ndarray | None) -> Estimate:
        return bootstrap_ratio(per_prompt(up), n if over is None else per_prompt(over), seed=seed)

    return PoleYardsticks(
        trait_gain=estimate(lp["neutral_steered"] - lp["neutral"], lp["told"] - lp["neutral"]),
        plain_gain=estimate(lp["plain_steered"] - lp["plain"], None),
        contrast=estimate(lp["plain_steered"] - lp["plain_opposite"], lp["told"] - lp["told_opposite"]),
    )


def bootstrap_ratio(numerator: np.ndarray, denominator: np.ndarray, *, seed: int) -> Estimate:
    """Σ numerator / Σ denominator over prompts, with a percentile interval; arrays (prompts,).

    t is that of the mean numerator being 0: a denominator near 0 widens the interval, not t.
    """
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(numerator), size=(RESAMPLES, len(numerator)))
    ratios = numerator[draws].sum(1) / denominator[draws].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    standard_error = numerator.std(ddof=1) / np.sqrt(len(numerator))
    t = numerator.mean() / standard_error if standard_error > 0 else 0.0
    value = numerator.sum() / denominator.sum()
    return Estimate(value=float(value), low=float(low), high=float(high), t=float(t))
