"""The contrastive losses against values derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ipissa.train.losses.antiparallel import antiparallel_loss, reference_spread
from ipissa.train.losses.constraints import (
    adaptive_weights,
    coherence_penalty,
    monotonic_hinge,
    ramp,
    total_variation_barrier,
)
from ipissa.train.losses.directions import DIRECTIONS, PairStates, snorm
from ipissa.train.losses.separation import (
    SEPARATION_LOSSES,
    SignFlip,
    masked_mean,
    separation,
    separation_loss,
    symlog,
)
from ipissa.train.losses.subspaces import intersect, suppressed_subspace, task_subspace, writable_subspace

G = torch.Generator().manual_seed(0)


def loss_at(p: float, kind: str, p_ref: float = 1.0, pole: int = 1) -> float:
    return float(separation_loss(torch.tensor(p).double(), torch.tensor(p_ref).double(), pole=pole, kind=kind))


def slope_at(p: float, kind: str) -> float:
    at = torch.tensor(p).double().requires_grad_()
    separation_loss(at, torch.tensor(1.0).double(), pole=1, kind=kind).backward()
    return float(at.grad)


def test_symlog_is_odd_and_monotone() -> None:
    x = torch.linspace(-50, 50, 1001)
    assert torch.equal(symlog(x), -symlog(-x))
    assert (symlog(x).diff() > 0).all()
    assert symlog(torch.tensor(math.e - 1)).item() == pytest.approx(1)


# p = 3, p_ref = 1: D = log 4 - log 2 = log 2, ratio = 3.
LOG2 = math.log(2)
SIGMOID = 1 / (1 + math.exp(-LOG2))  # 2/3
AT_LOG2 = {
    "raw": -LOG2,
    "softpl_strong_up": -math.log(1 + math.exp(0.1 * LOG2)),
    "logsig_weak_up": math.log(1 + math.exp(-0.1 * (LOG2 - 1))),
    "logsig_dpo": math.log(1 + math.exp(-0.1 * LOG2)),
    "focal_balanced": -((1 - SIGMOID) ** 2) * math.log(SIGMOID),
    "softpl_ratio": -math.log(1 + math.exp(2)),
    "tanh_sym": -math.tanh(0.3),
}


@pytest.mark.parametrize("kind", SEPARATION_LOSSES)
def test_every_separation_loss_has_its_hand_value_and_falls_as_separation_grows(kind: str) -> None:
    assert loss_at(3.0, kind) == pytest.approx(AT_LOG2[kind], rel=1e-9)
    assert loss_at(-3.0, kind, pole=-1) == pytest.approx(AT_LOG2[kind], rel=1e-9)  # roles swap at -1
    values = [loss_at(p, kind) for p in (-2.0, -0.5, 0.5, 1.0, 2.0, 5.0)]
    assert values == sorted(values, reverse=True)


def test_shapes_that_distinguish_the_separation_losses() -> None:
    assert loss_at(1.0, "logsig_dpo") == pytest.approx(LOG2)  # D = 0
    assert abs(slope_at(1e6, "focal_balanced") * 1e6) < 1e-9  # vanishes at large D
    d = torch.tensor([-5.0, 5.0], requires_grad=True)
    SEPARATION_LOSSES["softpl_strong_up"].of(d, d).sum().backward()
    assert d.grad[1].abs() > d.grad[0].abs()  # pulls harder once it is winning
    assert loss_at(3.0, "softpl_ratio") == pytest.approx(loss_at(30.0, "softpl_ratio", p_ref=10.0))  # scale-free
    assert abs(loss_at(1e9, "tanh_sym")) <= 1
    assert 0 < loss_at(1e9, "logsig_weak_up") < 0.2  # saturates: what is left to gain is next to nothing
    assert abs(slope_at(1e6, "logsig_weak_up") * 1e6) < 0.05 < abs(slope_at(1e6, "raw") * 1e6)


def test_some_losses_bound_or_drop_the_coherence_term() -> None:
    at = {kind: float(loss.coherence(torch.tensor(100.0))) for kind, loss in SEPARATION_LOSSES.items()}
    assert at == {
        **dict.fromkeys(SEPARATION_LOSSES, 100.0),
        "logsig_weak_up": 0,
        "softpl_ratio": pytest.approx(3),
        "tanh_sym": 1,
    }


def test_a_vanishing_reference_gives_finite_losses() -> None:
    for kind in SEPARATION_LOSSES:
        assert math.isfinite(loss_at(0.1, kind, p_ref=0.0))


def test_separation_is_the_masked_mean_projection() -> None:
    chosen = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    rejected = torch.zeros_like(chosen)
    u = torch.tensor([0.6, 0.8])
    both, first = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    assert separation(chosen, rejected, u, first).item() == pytest.approx(2.2)
    assert separation(chosen, rejected, u, both).item() == pytest.approx((2.2 + 5.0) / 2)


def test_several_directions_combine_to_a_signed_norm() -> None:
    chosen = torch.tensor([[[-3.0, -4.0, 9.0]]])
    u = torch.eye(3)[:2]
    assert separation(chosen, 0 * chosen, u, torch.ones(1, 1)).item() == pytest.approx(-5)


def states(pairs: int = 200, k: int = 80, dims: int = 16) -> PairStates:
    S = torch.linspace(10, 0.01, k)
    loud = torch.randn(k, generator=G)
    return PairStates(torch.randn(pairs, k, generator=G) * S + loud, torch.randn(pairs, k, generator=G), S=S, dims=dims)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_every_direction_is_a_unit_vector_towards_chosen(name: str) -> None:
    found, direction = states(), DIRECTIONS[name]
    u = direction(found)
    assert u.norm().item() == pytest.approx(1, abs=1e-5)
    assert found.difference.mean(0) @ u > 0


@pytest.mark.parametrize("name", ["top_diff_snorm", "adapter_dims"])
def test_states_in_units_of_the_singular_values_are_not_divided_by_them_again(name: str) -> None:
    outputs = states()
    units = outputs.S.clamp(min=0.1 * float(outputs.S.median()))
    inputs = PairStates(outputs.chosen / units, outputs.rejected / units, outputs.S, outputs.dims, snormed=True)
    kept = [(DIRECTIONS[name](each) != 0).nonzero()[:, 0].tolist() for each in (outputs, inputs)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["top_s", "top_diff", "top_diff_snorm", "adapter_dims", "adapter_dims_raw"])
def test_masked_directions_are_the_mean_difference_in_the_kept_dimensions(name: str) -> None:
    found = states()
    d, S = found.difference.mean(0), found.S
    tight = S.clamp(min=0.1 * float(S.median()))
    half = found.dims // 2

    def variance(chosen: Tensor, rejected: Tensor) -> list[int]:
        first = chosen.var(0).argsort(descending=True).tolist()[:half]
        rest = [i for i in rejected.var(0).argsort(descending=True).tolist() if i not in first]
        return first + rest[:half]

    kept = {
        "top_s": lambda: S.argsort(descending=True)[:16].tolist(),
        "top_diff": lambda: d.abs().argsort(descending=True)[:16].tolist(),
        "top_diff_snorm": lambda: (d / tight).abs().argsort(descending=True)[:16].tolist(),
        "adapter_dims": lambda: variance(found.chosen / tight, found.rejected / tight),
        "adapter_dims_raw": lambda: variance(found.chosen, found.rejected),
    }[name]()
    expected = torch.zeros_like(d)
    expected[kept] = d[kept]
    assert (DIRECTIONS[name](found) - expected / expected.norm()).abs().max() < 1e-6


def test_the_mean_direction_does_not_depend_on_an_orthogonal_basis() -> None:
    """z · u through a square orthogonal V is h · normalise(mean difference): the projection is a no-op."""
    chosen, rejected = torch.randn(2, 50, 32, generator=G)
    V = torch.linalg.qr(torch.randn(32, 32, generator=G)).Q
    plain = DIRECTIONS["mean"](PairStates(chosen, rejected, torch.ones(32)))
    turned = DIRECTIONS["mean"](PairStates(chosen @ V, rejected @ V, torch.ones(32)))
    assert ((chosen @ V) @ turned - chosen @ plain).abs().max() < 1e-4


def test_principal_components_keep_the_part_of_the_mean_they_span() -> None:
    """Differences vary along axis 0 and 1 only, so pca2 keeps the mean there and drops axis 2."""
    difference = torch.tensor([[4.0, 1.0, 5.0], [-2.0, 1.0, 5.0], [1.0, 3.0, 5.0], [1.0, -1.0, 5.0]])
    found = PairStates(difference, torch.zeros_like(difference), torch.ones(3))
    assert torch.allclose(DIRECTIONS["pca1"](found), torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    assert torch.allclose(DIRECTIONS["pca2"](found), torch.tensor([1.0, 1.0, 0.0]) / 2**0.5, atol=1e-6)


def test_snorm_is_finite_with_tiny_singular_values() -> None:
    S = torch.tensor([10.0, 4.0, 2.0, 1e-12, 0.0])
    assert torch.allclose(snorm(torch.ones(5), S), torch.tensor([0.1, 0.25, 0.5, 5.0, 5.0]))


@pytest.mark.parametrize("direction", ["adapter_dims", "top_diff_snorm"])
def test_states_are_divided_by_singular_values_once(direction: str) -> None:
    torch.manual_seed(0)
    chosen, rejected, S = torch.randn(9, 12), torch.randn(9, 12), torch.linspace(4, 0.5, 12)
    plain = DIRECTIONS[direction](PairStates(chosen, rejected, S, dims=4))
    normed = DIRECTIONS[direction](PairStates(snorm(chosen, S), snorm(rejected, S), S, dims=4, snormed=True))
    assert torch.equal(plain != 0, normed != 0)  # the same dimensions are chosen


def test_the_flip_decides_by_the_running_mean_and_is_sticky() -> None:
    flip = SignFlip()

    def step(positive: float, negative: float) -> int:
        return flip.update({"a": torch.tensor([positive])}, {"a": torch.tensor([negative])})["a"]

    assert step(-1.0, 1.0) == -1  # evidence -0.1 * 2 log 2
    assert flip.evidence[""] == pytest.approx(-0.2 * LOG2)
    assert step(0.5, -0.5) == -1  # 0.9 * -0.139 + 0.1 * 0.81 < 0: one batch does not turn it
    assert [step(0.5, -0.5) for _ in range(3)][-1] == 1
    resumed = SignFlip()
    resumed.load_state_dict(flip.state_dict())
    assert resumed.evidence == flip.evidence


def test_the_flip_is_global_or_per_layer() -> None:
    positive = {"a": torch.tensor([2.0]), "b": torch.tensor([-1.0])}
    negative = {"a": torch.tensor([0.0]), "b": torch.tensor([0.0])}
    assert SignFlip().update(positive, negative) == {"a": 1, "b": 1}
    assert SignFlip(per_layer=True).update(positive, negative) == {"a": 1, "b": -1}


def test_the_flip_is_unbiased_where_the_published_rule_always_flips() -> None:
    """Random p(±1) around a positive reference: ours flips half the time, the sum of the losses always."""
    p_ref = torch.full((1000,), 5.0)
    positive, negative = p_ref + 0.1 * torch.randn(2, 1000, generator=G)
    ours = [SignFlip().update({"a": p[None]}, {"a": n[None]})["a"] for p, n in zip(positive, negative, strict=True)]
    assert 0.4 < sum(sign == 1 for sign in ours) / 1000 < 0.6
    published = separation_loss(positive, p_ref, pole=1, kind="raw") + separation_loss(
        negative, p_ref, pole=-1, kind="raw"
    )
    assert (published > 0).all()


def test_coherence_is_free_below_the_threshold_and_one_easy_token_cannot_pay_for_a_hard_one() -> None:
    ref, mask = torch.zeros(1, 4), torch.ones(1, 4)
    assert coherence_penalty(ref, torch.full((1, 4), -0.49), mask).item() == 0
    spike = torch.tensor([[-1.5, 10.0, 0.0, 0.0]])
    assert coherence_penalty(ref, spike, mask).item() == pytest.approx(40 * LOG2 / 4)  # log(1 + 1.5 - 0.5)
    assert masked_mean(torch.tensor([[1.0, 5.0]]), torch.tensor([[1, 0]])).item() == 1


def barrier(reference: list[float], now: list[float], k: int | None = None, weight: float = 10.0) -> float:
    """At one token, against the k likeliest tokens of the reference."""
    p = torch.tensor([[reference]])
    top = p.topk(k or len(reference))
    entropy = -torch.special.xlogy(p, p).sum(-1)
    logprobs = torch.tensor([[now]]).log()
    return total_variation_barrier(
        logprobs, top.indices, top.values.log(), entropy, torch.ones(1, 1), weight=weight
    ).item()


def test_the_total_variation_barrier_is_zero_inside_and_hand_computed_outside() -> None:
    entropy = -(0.99 * math.log(0.99) + 0.01 * math.log(0.01))
    allowed = 0.9 * math.sqrt(entropy + 0.02)
    assert barrier([0.99, 0.01], [0.99 - allowed * 0.99, 0.01 + allowed * 0.99]) == 0
    excess = 0.8 - allowed
    expected = math.log(1 + 10 * excess) ** 2 + excess
    assert barrier([0.99, 0.01], [0.19, 0.81]) == pytest.approx(expected, rel=1e-4)
    assert barrier([0.99, 0.01], [0.19, 0.81], weight=0) == 0
    assert barrier([0.25] * 4, [0.0, 0.0, 0.0, 1.0]) == 0  # H = log 4 > 1.21
    assert math.isfinite(barrier([0.0, 0.0, 0.0, 1.0], [0.25] * 4))


def test_the_barrier_counts_the_tokens_it_was_not_told_of_as_one() -> None:
    """From 0.9 to 0.1 at the likeliest and from 0.1 to 0.9 in the rest: TV = 0.8 either way."""
    reference, now = [0.9, 0.06, 0.04], [0.1, 0.5, 0.4]
    assert barrier(reference, now, k=1) == pytest.approx(barrier(reference, now))
    # What moves among the rest is not seen: TV = 0.74 by all tokens, 0.7 by the first and the rest.
    assert 0 < barrier(reference, [0.2, 0.02, 0.78], k=1) < barrier(reference, [0.2, 0.02, 0.78])


def test_the_monotonic_hinge_accepts_either_order_and_refuses_one_sided_poles() -> None:
    up, down = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -0.5])
    assert monotonic_hinge(down, up).item() == 0
    assert monotonic_hinge(up, down).item() == 0
    # Both at 0.1: forward 0.15 + 0, backward 0 + 0.15.
    same = torch.full((2,), 0.1)
    assert monotonic_hinge(same, same).item() == pytest.approx(15, rel=1e-5)
    assert monotonic_hinge(0 * same, 0 * same).item() == pytest.approx(10, rel=1e-5)  # both margins


def test_adaptive_weights_relax_the_pole_that_lags() -> None:
    weights = adaptive_weights(torch.tensor(-0.5), torch.tensor(-3.0), temperature=1.0)
    assert weights.tolist() == pytest.approx([0.1517, 1.0], abs=1e-3)


def test_ramps_rise_linearly() -> None:
    assert [ramp(step, 100) for step in (0, 10, 20, 50)] == [0, 0.5, 1, 1]
    assert ramp(0, 100, fraction=0) == 1


def test_antiparallel_shifts_along_the_reference_reach_the_minimum() -> None:
    basis = torch.eye(6)[:, :2]
    reference = torch.tensor([[1.0, 2.0, 0, 0, 0, 0], [-1.0, 2.0, 0, 0, 0, 0]])
    along = reference * 0.3  # the reference's spread is 1 in dimension 0, floored elsewhere: see below
    scaled = along.clone()
    spread = reference_spread(reference)
    assert spread.tolist() == pytest.approx([1.0] + 5 * [0.05])
    apart = antiparallel_loss(reference + scaled, reference - scaled, reference, basis, spread)
    assert apart.tolist() == pytest.approx([-30.0, -30.0], abs=1e-3)
    same_side = antiparallel_loss(reference + scaled, reference + 2 * scaled, reference, basis, spread)
    assert same_side.tolist() == pytest.approx([930.0, 930.0], rel=1e-4)  # 30 + 30²
    # What a pair costs does not depend on those that it shares a batch with.
    one = antiparallel_loss(*(each[:1] for each in (reference + scaled, reference - scaled, reference)), basis, spread)
    assert one.item() == pytest.approx(apart[0].item())


def test_a_pair_that_nothing_shifts_has_a_finite_gradient() -> None:
    reference = torch.tensor([[1.0, 2.0, 0.0], [-1.0, 2.0, 1.0]])
    shift = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.2, 0.3]], requires_grad=True)
    spread = reference_spread(reference)
    loss = antiparallel_loss(reference + shift, reference - shift, reference, torch.eye(3)[:, :2], spread)
    loss.sum().backward()
    assert shift.grad is not None
    assert shift.grad.isfinite().all()
    assert shift.grad[1].any()


def test_shifts_outside_the_subspace_are_discounted() -> None:
    basis = torch.eye(4)[:, :1]
    reference = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])  # spread 1 in dimension 0, floor 0.05 elsewhere
    shift = torch.tensor([[0.05, 0.05 * 0.05, 0, 0], [-0.05, 0.05 * 0.05, 0, 0]])  # in units: (0.05, 0.05)
    spread = reference_spread(reference)
    found = antiparallel_loss(reference + shift, reference - shift, reference, basis, spread)
    assert found.tolist() == pytest.approx([-30 * 0.5**0.75] * 2, rel=1e-4)


def orthonormal(basis: Tensor) -> bool:
    return bool((basis.T @ basis - torch.eye(basis.shape[1])).abs().max() < 1e-5)


def test_subspaces_are_orthonormal_and_of_the_rank_asked_for() -> None:
    difference = torch.randn(50, 32, generator=G)
    weights = [torch.randn(32, 16, generator=G) for _ in range(3)]
    stream = torch.randn(5, 10, 32, generator=G).cumsum(0)
    for basis in (
        task_subspace(difference, 4),
        writable_subspace(weights, 8),
        suppressed_subspace(stream, torch.randn(100, 8, generator=G) @ torch.randn(8, 32, generator=G), 4),
    ):
        assert orthonormal(basis)
    assert task_subspace(difference, 4).shape == (32, 4)
    assert writable_subspace(weights, 8).shape == (32, 8)
    assert suppressed_subspace(stream, torch.randn(100, 32, generator=G), 4).shape == (32, 4)


def test_all_singular_directions_of_the_differences_rebuild_them() -> None:
    difference = torch.randn(20, 32, generator=G)
    basis = task_subspace(difference, 20)
    assert (difference @ basis @ basis.T - difference).abs().max() < 1e-5


def test_what_is_written_and_then_erased_is_found_as_suppressed() -> None:
    stream = 0.01 * torch.randn(4, 30, 32, generator=G)
    directions = torch.linalg.qr(torch.randn(32, 4, generator=G)).Q.T  # of mixed signs, along no dimension
    erased, read, kept, added = directions
    stream[1] += 5 * torch.randn(30, 1, generator=G) * erased  # written by the second block, gone after the third
    stream[1] += 10 * read  # so too, but read by the unembedding
    stream[1:] += 5 * kept
    stream += torch.arange(4.0)[:, None, None] * added  # written by every block
    unembedding = torch.stack([10 * read, 10 * read])
    found = suppressed_subspace(stream, unembedding, 1)[:, 0]
    assert abs(found @ erased) > 0.95  # what is written together with it leans on it a little


def test_what_no_block_erases_is_not_suppressed() -> None:
    stream = torch.arange(4.0)[:, None, None] * torch.randn(1, 30, 32, generator=G)
    assert suppressed_subspace(stream, torch.eye(32)[:2], 3).shape == (32, 0)


def test_the_intersection_holds_shared_directions_and_bisects_near_ones() -> None:
    e = torch.eye(6)
    assert intersect(e[:, :2], e[:, 2:4]).shape == (6, 0)
    shared = intersect(e[:, :3], e[:, 2:5])
    assert shared.shape == (6, 1)
    assert shared[2].abs().item() == pytest.approx(1)
    tilted = (e[:, 0] + e[:, 1])[:, None] / 2**0.5
    bisector = intersect(e[:, :1], tilted)[:, 0].abs()
    assert bisector[:2].tolist() == pytest.approx([math.cos(math.pi / 8), math.sin(math.pi / 8)], abs=1e-5)
