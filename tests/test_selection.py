"""Rules that choose singular triples, against brute force over module outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor

from ipissa.data.activations import pad_pairs
from ipissa.data.pairs import ContrastivePair
from ipissa.errors import ConfigError
from ipissa.train.selection import SELECTIONS, TripleStatistics, select

D_OUT, D_IN, PAIRS, R = 20, 30, 40, 6


class Module:
    """A random linear layer with a few loud directions, and inputs of pairs that differ in a few others."""

    def __init__(self, seed: int = 0, name: str = "layers.0.o_proj") -> None:
        g = torch.Generator().manual_seed(seed)
        self.W = torch.randn(D_OUT, D_IN, generator=g).double()
        self.U, self.S, vh = torch.linalg.svd(self.W, full_matrices=False)
        self.V = vh.T
        scale = torch.rand(D_IN, generator=g).double() + 0.1
        self.chosen = torch.randn(PAIRS, D_IN, generator=g).double() * scale + 0.3
        self.rejected = torch.randn(PAIRS, D_IN, generator=g).double() - 0.2
        self.stream = torch.randn(2, PAIRS, D_OUT, generator=g).double()
        self.stats = TripleStatistics(
            name, self.S, self.chosen @ self.V, self.rejected @ self.V, *(self.stream @ self.U)
        )

    def outputs(self, snorm: bool = False) -> tuple[Tensor, Tensor]:
        """Module outputs in the left singular basis, divided by S if asked; (rows, k) chosen and rejected."""
        found = [x @ self.W.T @ self.U for x in (self.chosen, self.rejected)]
        return tuple(y / self.S for y in found) if snorm else tuple(found)


def best(score: Tensor, n: int, among: set[int] | None = None) -> set[int]:
    order = [i for i in score.argsort(descending=True).tolist() if among is None or i in among]
    return set(order[:n])


def chosen_by(rule: str, module: Module | None = None) -> set[int]:
    return set(select(rule, (module or Module()).stats, R).tolist())


@pytest.mark.parametrize("rule", SELECTIONS)
@pytest.mark.parametrize("r", [2, 7, 19, 20, 99])
def test_every_rule_gives_r_different_indices_in_rising_order(rule: str, r: int) -> None:
    found = select(rule, Module().stats, r).tolist()
    assert found == sorted(set(found))
    assert len(found) == min(r, D_OUT)
    assert set(found) <= set(range(D_OUT))


def test_top_takes_the_first() -> None:
    assert chosen_by("top") == set(range(R))


def test_random_is_another_draw_for_every_module_and_every_seed_of_a_run() -> None:
    assert chosen_by("random") == chosen_by("random") != chosen_by("random", Module(name="layers.1.o_proj"))
    assert chosen_by("random") != chosen_by("top")
    drawn = {tuple(select("random", replace(Module().stats, seed=seed), R).tolist()) for seed in range(5)}
    assert len(drawn) == 5


def test_dhs_takes_the_largest_mean_output_differences() -> None:
    chosen, rejected = Module().outputs()
    assert chosen_by("dhs") == best((chosen - rejected).mean(0).abs(), R)


def test_outputs_divided_by_singular_values_are_the_coordinates() -> None:
    module = Module()
    for y, coordinates in zip(module.outputs(snorm=True), (module.stats.chosen, module.stats.rejected), strict=True):
        assert (y - coordinates).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("rule", "score", "snorm"),
    [
        ("mean_abs", lambda d: d.mean(0).abs(), False),
        ("mean_abs_snorm", lambda d: d.mean(0).abs(), True),
        ("std", lambda d: d.std(0), False),
        ("var", lambda d: d.var(0), False),
        ("var_snorm", lambda d: d.var(0), True),
    ],
)
def test_signed_rules_take_half_from_each_sign_of_the_mean(rule: str, score: object, snorm: bool) -> None:
    chosen, rejected = Module().outputs(snorm)
    difference = chosen - rejected
    positive = set((difference.mean(0) > 0).nonzero()[:, 0].tolist())
    negative = set(range(D_OUT)) - positive
    assert min(len(positive), len(negative)) >= R // 2
    found = chosen_by(rule)
    assert found == best(score(difference), R // 2, positive) | best(score(difference), R // 2, negative)


def test_a_side_with_too_few_triples_is_filled_from_the_other() -> None:
    ones = torch.ones(4, 8)
    stats = TripleStatistics("m", torch.arange(8, 0, -1.0), ones, 0 * ones, ones, ones)  # all differences positive
    assert select("mean_abs", stats, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("rule", "snorm"), [("cho_var_snorm", True), ("cho_var_raw", False)])
def test_cho_var_takes_half_by_chosen_then_half_by_rejected_variance(rule: str, snorm: bool) -> None:
    chosen, rejected = Module().outputs(snorm)
    first = best(chosen.var(0), R // 2)
    assert chosen_by(rule) == first | best(rejected.var(0), R // 2, set(range(D_OUT)) - first)


def test_chorej_takes_thirds() -> None:
    chosen, rejected = Module().outputs(snorm=True)
    found: set[int] = set()
    for variance in (chosen.var(0), rejected.var(0), (chosen - rejected).var(0)):
        found |= best(variance, R // 3, set(range(D_OUT)) - found)
    assert chosen_by("chorej_var_snorm") == found


def test_wanda_takes_thirds_by_size_in_the_stream_and_pads_overlaps() -> None:
    module = Module()
    chosen, rejected = module.stream @ module.U
    scores = [module.S * s for s in (chosen.abs().mean(0), rejected.abs().mean(0), (chosen - rejected).mean(0).abs())]
    thirds = set().union(*(best(score, R // 3) for score in scores))
    assert len(thirds) < R, "the thirds overlap, so padding is tested"
    rest = set(range(D_OUT)) - thirds
    assert chosen_by("wanda_trip") == thirds | best(torch.stack(scores).amax(0), R - len(thirds), rest)


def test_replacing_singular_values_by_projections_leaves_the_mass_in_the_residual() -> None:
    """Why rules return indices only: a projection is at most 1, singular values here are around 10 to 1000."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(64, 96, generator=g).double() * 20
    U, S, vh = torch.linalg.svd(W, full_matrices=False)
    difference = torch.randn(96, generator=g).double() @ W.T
    J = (difference @ U).abs().topk(16).indices
    projections = (difference / difference.norm() @ U)[J].abs()

    def share(values: Tensor) -> tuple[float, float]:
        part = U[:, J] * values @ vh[J]
        return float(part.norm() / W.norm()), float((W - part).norm() / W.norm())

    own_adapter, own_residual = share(S[J])
    adapter, residual = share(projections)
    assert own_adapter > 0.4
    assert own_residual < 0.95
    assert adapter < 0.002
    assert abs(residual - 1) < 0.002
    rescaled = projections * S[J].norm() / projections.norm()
    assert share(rescaled)[0] == pytest.approx(own_adapter)  # the norm is back, the triples are not W's own
    assert not torch.allclose(rescaled, S[J], rtol=0.1)


def test_the_share_of_the_sixteen_most_different_triples_that_is_missed_falls_with_rank() -> None:
    """Where triples differ between poles as they vary, a rule by variance finds them, and chance does not."""
    g = torch.Generator().manual_seed(0)
    count = 64
    loud = 0.9 ** torch.randperm(count, generator=g).double()
    chosen, rejected = torch.randn(2, PAIRS, count, generator=g).double() * loud
    stats = TripleStatistics("m", torch.ones(count).double(), chosen + 2 * loud, rejected, chosen, rejected)

    def missed(rule: str) -> list[float]:
        most = set(select("dhs", stats, 16).tolist())
        return [len(most - set(select(rule, stats, r).tolist())) / 16 for r in (8, 16, 24, 32, 64)]

    found, chance = missed("cho_var_snorm"), missed("random")
    assert found == sorted(found, reverse=True)
    assert found[:2] == pytest.approx([8 / 16, 0], abs=0.13)
    assert found[3:] == [0, 0]
    assert chance[1] > 0.5


def test_activations_that_are_not_finite_are_refused() -> None:
    stats = Module().stats
    broken = TripleStatistics("m", stats.S, stats.chosen * torch.nan, *([stats.chosen] * 3))
    with pytest.raises(ConfigError, match="Activations of m are not finite"):
        select("dhs", broken, R)


def test_the_last_states_of_a_minimal_pair_differ(tokenizer: Any) -> None:
    """Six shared tokens after contexts that differ in one word: the difference is what is still to be said."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    texts = [f"I {verb} cheese; let me tell you about the andes mountains" for verb in ("love", "hate")]
    ids = [tokenizer.encode(text) for text in texts]
    shared = ids[0][-6:]
    assert ids[1][-6:] == shared
    pair = ContrastivePair("", ids[0][:-6], ids[1][:-6], shared)
    padded = pad_pairs([pair], pad_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        output = model(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            position_ids=padded.position_ids,
            output_hidden_states=True,
        )
    for states in output.hidden_states[1:]:
        assert ((states[0, -6:] - states[1, -6:]).norm(dim=-1) > 1e-4).all()
    assert torch.equal(output.hidden_states[0][0, -6:], output.hidden_states[0][1, -6:])
