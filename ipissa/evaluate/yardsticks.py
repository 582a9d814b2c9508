"""Three yardsticks of a steering adapter that breaking text or saying Yes cannot satisfy.

lp_s(k, α) is the mean log-likelihood per token, in nats, of what the base model writes about held-out
prompts under the persona of pole s, given context k (none, neutral persona 0, persona s) and steered
at α (`held_out` reads it). With a_s = +α at the positive pole and -α at the negative:

    trait gain  [lp_s(0, a_s) - lp_s(0, 0)] / [lp_s(s, 0) - lp_s(0, 0)]
                the part of the persona prompt's own trait effect that steering recovers; 1 is as
                good as being told, breaking text or inverting the sign makes it negative
    plain gain  lp_s(none, a_s) - lp_s(none, 0), in nats: what a user without personas gets
    contrast    [lp_s(none, a_s) - lp_s(none, -a_s)] / [lp_s(s, 0) - lp_s(-s, 0)]
                easily gamed by breaking text at the other pole, so never quoted alone

Texts are drawn from the whole distribution of the told model (`Sampling.whole`), and log-likelihoods are averaged
over what it might write at every token. Being told is then the most that any dial can reach, by Gibbs'
inequality, and the trait gain is the part of KL(told || neutral) that steering removes. Texts drawn at a
temperature below 1 break this: a dial that only makes the model surer gains there.

Intervals are 95 % percentile bootstraps over prompts, the unit that was held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from ipissa.data.personas import Trait
from ipissa.evaluate.dial import Dial
from ipissa.evaluate.held_out import HeldOut, Setting
from ipissa.evaluate.response import symmetry

SIGN = {1: "+", -1: "-"}
RESAMPLES = 2000
SURE = 0.05
RESPONSE_ALPHAS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, and t of its numerator being 0: its mean over prompts / its standard error."""

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
    by_prompt: TraitSums | None = None  # None where they were not kept
    prompts: int | None = None  # with a text of this pole; None in files of versions that counted those of both


@dataclass(frozen=True)
class TraitSums:
    """What the trait gain of a pole is the ratio of, per held-out prompt, in nats.

    Args:
        prompts: Those that have a text of this pole.
        steered: What steering adds to the log-likelihood of the prompt's texts.
        told: What the persona prompt adds; the same for every method, but for rounding.
    """

    prompts: tuple[str, ...]
    steered: tuple[float, ...]
    told: tuple[float, ...]


@dataclass(frozen=True)
class Yardsticks:
    """What steering at ±α does to held-out text of both poles."""

    alpha: float
    prompts: int
    positive: PoleYardsticks
    negative: PoleYardsticks

    def to_dict(self, *, by_prompt: bool = False) -> dict[str, Any]:
        """Plain values, for JSON; what each prompt contributes on demand only."""
        values = asdict(self)
        if not by_prompt:
            for pole in ("positive", "negative"):
                del values[pole]["by_prompt"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Yardsticks:
        """What `to_dict` gave."""

        def pole(name: str) -> PoleYardsticks:
            figures = dict(values[name])
            sums, prompts = figures.pop("by_prompt", None), figures.pop("prompts", None)
            return PoleYardsticks(
                **{figure: Estimate(**each) for figure, each in figures.items()},
                prompts=prompts,
                by_prompt=None if sums is None else TraitSums(**{side: tuple(each) for side, each in sums.items()}),
            )

        return cls(values["alpha"], values["prompts"], positive=pole("positive"), negative=pole("negative"))

    def shortcomings(self, alpha_range: tuple[float, float]) -> list[str]:
        """What a user must know before relying on the adapter, one sentence each; empty if it works.

        Args:
            alpha_range: The adapter's, in which text holds together.
        """
        found = []
        poles = {"+": self.positive, "-": self.negative}
        low, high = alpha_range
        if low > -self.alpha or high < self.alpha:
            found.append(
                f"Text holds together from {low:+g} to {high:+g} only, and what follows was measured at "
                f"|α| = {self.alpha:g}, where it does not at both poles."
            )
        losing = [sign for sign, pole in poles.items() if pole.plain_gain.value <= 0]
        if len(losing) == 2:
            found.append("Both poles make their own texts less likely than no steering does: it only breaks text.")
        elif losing:
            found.append(
                f"At α = {losing[0]}{self.alpha:g} the pole's own texts are less likely than without steering, for "
                "users who give the model no persona."
            )
        for sign, pole in poles.items():
            gain = pole.trait_gain
            if gain.value <= 0 or gain.t < _least_t(pole.prompts or self.prompts):
                found.append(
                    f"At α = {sign}{self.alpha:g} the trait gain is {gain.value:.2f} (t {gain.t:.1f}), "
                    "which is not distinguishable from nothing."
                )
        return found


def _least_t(prompts: int) -> float:
    """The t from which a mean over so many prompts is told from 0, both sides: 2.0 of 100, 4.3 of 3."""
    return float(stats.t.ppf(1 - SURE / 2, prompts - 1))


def measure_yardsticks(dial: Dial, held_out: HeldOut, *, alpha: float = 1.0) -> Yardsticks:
    """Measure a dial on held-out texts of both poles."""

    def settings(pole: int) -> dict[str, Setting]:
        return {
            **_references(pole),
            "neutral_steered": Setting(0, pole * alpha),
            "plain_steered": Setting(None, pole * alpha),
            "plain_opposite": Setting(None, -pole * alpha),
        }

    return _measure(dial, held_out, settings, alpha=alpha)


def worse_trait_gains(dial: Dial, held_out: HeldOut, alphas: Sequence[float]) -> dict[float, float]:
    """The trait gain of the worse pole at every |α|; NaN where a pole has none."""
    gains: dict[float, list[float]] = {alpha: [] for alpha in alphas}
    for pole in (1, -1):
        settings = {"told": Setting(pole, 0.0), "neutral": Setting(0, 0.0)}
        steered = {f"{alpha:g}": Setting(0, pole * alpha) for alpha in alphas}
        lp = held_out.log_likelihoods(dial, pole, settings | steered, label=f"scales {SIGN[pole]}")
        for alpha in alphas:
            gain = (lp[f"{alpha:g}"] - lp["neutral"]).sum() / (lp["told"] - lp["neutral"]).sum()
            gains[alpha].append(float(gain))
    return {alpha: float(np.min(of_poles)) for alpha, of_poles in gains.items()}


def measure_persona_prompt(dial: Dial, held_out: HeldOut, *, told_by: Trait | None = None) -> Yardsticks:
    """The same yardsticks of telling the model.

    Told by the trait itself, gain and contrast are 1 by definition, and the plain gain is measured. `told_by`
    tells it in other words: where the yardsticks have the neutral persona, over it.
    """
    words = None if told_by == held_out.trait else told_by
    over_neutral = None if words is None else words.over_neutral()

    def settings(pole: int) -> dict[str, Setting]:
        return {
            **_references(pole),
            "neutral_steered": Setting(pole, 0.0, over_neutral),
            "plain_steered": Setting(pole, 0.0, words),
            "plain_opposite": Setting(-pole, 0.0, words),
        }

    return _measure(dial, held_out, settings, alpha=1.0)


def _references(pole: int) -> dict[str, Setting]:
    """What the base model says, told and untold."""
    return {
        "neutral": Setting(0, 0.0),
        "told": Setting(pole, 0.0),
        "told_opposite": Setting(-pole, 0.0),
        "plain": Setting(None, 0.0),
    }


def _measure(
    dial: Dial, held_out: HeldOut, settings: Callable[[int], dict[str, Setting]], *, alpha: float
) -> Yardsticks:
    def measured(pole: int) -> PoleYardsticks:
        lp = held_out.log_likelihoods(dial, pole, settings(pole), label=f"yardsticks {SIGN[pole]}")
        return _pole_yardsticks(lp, held_out, pole)

    return Yardsticks(alpha, len(held_out.prompts), positive=measured(1), negative=measured(-1))


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


def response_curve(dial: Dial, held_out: HeldOut, *, alphas: Sequence[float] = RESPONSE_ALPHAS) -> list[ResponsePoint]:
    """How held-out texts of both poles become likelier or less likely as the dial turns."""
    gains = {}
    for pole in (1, -1):
        settings = {f"{alpha:g}": Setting(None, alpha) for alpha in sorted({0.0, *alphas})}
        lp = held_out.log_likelihoods(dial, pole, settings, label=f"response {SIGN[pole]}")
        tokens = held_out.tokens(pole).sum()
        gains[pole] = {name: float((sums - lp["0"]).sum() / tokens) for name, sums in lp.items()}
    return [ResponsePoint(float(name), gains[1][name], gains[-1][name]) for name in gains[1]]


def pole_preference(dial: Dial, held_out: HeldOut) -> float:
    """Nats per token by which texts of each pole are likelier at their own α = ±1 than at the other."""
    total = 0.0
    for pole in (1, -1):
        settings = {"own": Setting(None, pole), "other": Setting(None, -pole)}
        lp = held_out.log_likelihoods(dial, pole, settings, label=f"sign {SIGN[pole]}")
        total += float((lp["own"] - lp["other"]).sum() / held_out.tokens(pole).sum())
    return total


def _pole_yardsticks(lp: dict[str, np.ndarray], held_out: HeldOut, pole: int) -> PoleYardsticks:
    # A prompt without a text of this pole (it was too short) says nothing about it; as a 0 it would lower t.
    prompts, cluster = np.unique([text.prompt for text in held_out.texts[pole]], return_inverse=True)

    def per_prompt(values: np.ndarray) -> np.ndarray:
        return np.bincount(cluster, weights=values)

    n = per_prompt(held_out.tokens(pole))

    def estimate(up: np.ndarray, over: np.ndarray | None) -> Estimate:
        return bootstrap_ratio(per_prompt(up), n if over is None else per_prompt(over), seed=0)

    steered, told = lp["neutral_steered"] - lp["neutral"], lp["told"] - lp["neutral"]
    return PoleYardsticks(
        trait_gain=estimate(steered, told),
        plain_gain=estimate(lp["plain_steered"] - lp["plain"], None),
        contrast=estimate(lp["plain_steered"] - lp["plain_opposite"], lp["told"] - lp["told_opposite"]),
        prompts=len(prompts),
        by_prompt=TraitSums(
            tuple(prompts.tolist()), tuple(per_prompt(steered).tolist()), tuple(per_prompt(told).tolist())
        ),
    )


def trait_gain_above(one: PoleYardsticks, other: PoleYardsticks) -> Estimate:
    """How much more trait gain one method has than another, both measured on the same texts of one pole.

    Prompts are drawn once for both in every resample, so what makes a prompt hard for both leaves the interval alone.

    Raises:
        ValueError: they were measured on other prompts, or it was not kept what each of them contributes.
    """
    if one.by_prompt is None or other.by_prompt is None or one.by_prompt.prompts != other.by_prompt.prompts:
        raise ValueError("Trait gains can be compared per prompt only where both were measured on the same ones.")
    more = np.subtract(one.by_prompt.steered, other.by_prompt.steered)
    return bootstrap_ratio(more, np.array(one.by_prompt.told), seed=0)


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
