"""Rotations, their phase form and the clamps, against definitions."""

import math

import numpy as np
import pytest
import torch
from oracle import rotation

from ipissa.errors import ConfigError
from ipissa.rotation import PHASES, ROTATIONS, clamp_angles, clamp_entries, schur_planes, skew

ALPHAS = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)


def random_skew(r: int, scale: float = 0.5, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return skew(torch.randn(r, r, dtype=torch.float64) * scale)


@pytest.mark.parametrize("method", ROTATIONS)
@pytest.mark.parametrize("r", [2, 5, 32])
def test_rotations_are_orthogonal_and_reversible(method: str, r: int) -> None:
    rotations = ROTATIONS[method](random_skew(r), ALPHAS)
    torch.testing.assert_close(rotations.mT @ rotations, torch.eye(r, dtype=torch.float64).expand(len(ALPHAS), r, r))
    backwards = ROTATIONS[method](random_skew(r), -ALPHAS)
    torch.testing.assert_close(backwards, rotations.mT)


@pytest.mark.parametrize("method", ROTATIONS)
def test_rotations_equal_the_definition(method: str) -> None:
    a = random_skew(16)
    expected = np.stack([rotation(a.numpy(), alpha, method) for alpha in ALPHAS.tolist()])
    # torch's matrix_exp is good to about 1e-9; Cayley's linear solve to rounding.
    assert np.abs(ROTATIONS[method](a, ALPHAS).numpy() - expected).max() < 1e-8


@pytest.mark.parametrize("method", ROTATIONS)
def test_rotation_at_alpha_zero_is_exactly_the_identity(method: str) -> None:
    assert torch.equal(ROTATIONS[method](random_skew(7), torch.zeros(1, dtype=torch.float64))[0], torch.eye(7))


@pytest.mark.parametrize("method", ROTATIONS)
@pytest.mark.parametrize("r", [2, 3, 8, 33])
def test_phase_form_equals_the_definition(method: str, r: int) -> None:
    a = random_skew(r, seed=r)
    q, theta = schur_planes(a)
    x = torch.randn(4, r, dtype=torch.float64)
    for alpha in ALPHAS.tolist():
        z = torch.view_as_complex((x @ q).unflatten(-1, (-1, 2)).contiguous())
        turned = z * torch.exp(1j * PHASES[method](theta, alpha))
        by_phases = torch.view_as_real(turned).flatten(-2) @ q.mT
        by_definition = x.numpy() @ rotation(a.numpy(), alpha, method)
        assert np.abs(by_phases.numpy() - by_definition).max() < 1e-12


@pytest.mark.parametrize("a", [torch.zeros(6, 6), torch.block_diag(random_skew(3), torch.zeros(3, 3))])
def test_planes_of_a_degenerate_matrix_still_rebuild_it(a: torch.Tensor) -> None:
    a = a.double()
    q, theta = schur_planes(a)
    block = torch.zeros(len(theta) * 2, len(theta) * 2, dtype=torch.float64)
    for k, value in enumerate(theta):
        block[2 * k, 2 * k + 1], block[2 * k + 1, 2 * k] = value, -value
    assert (q @ block @ q.mT - a).abs().max() < 1e-14


def test_entry_clamp_bounds_entries_and_not_angles() -> None:
    clamped = clamp_entries(random_skew(64, scale=50), 0.3, "cayley")
    assert clamped.abs().max() <= 0.3
    largest = 2 * math.atan(np.abs(np.linalg.eigvals(clamped.numpy()).imag).max() / 2)
    assert largest > 1.5  # radians: five times the 0.3 that the published name suggests


def test_the_gradient_of_the_entry_clamp_is_finite_however_far_beyond_it_entries_are() -> None:
    p = (random_skew(8, scale=1e4)).requires_grad_()
    clamp_entries(p, 0.3, "cayley").sum().backward()
    assert p.grad.isfinite().all()
    near = (torch.randn(5, 5, dtype=torch.float64) * 0.4).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: clamp_entries(skew(p), 0.3, "cayley"), near)


@pytest.mark.parametrize("method", ROTATIONS)
def test_angle_clamp_bounds_every_angle_at_alpha_one(method: str) -> None:
    _, theta = schur_planes(clamp_angles(random_skew(64, scale=50), 0.3, method))
    angles = PHASES[method](theta, 1.0).abs()
    assert angles.max() <= 0.3 + 1e-12
    assert angles.max() > 0.29


def test_angle_clamp_leaves_small_angles_and_planes_alone() -> None:
    a = random_skew(9, scale=1e-4)
    assert (clamp_angles(a, 0.3, "matrix_exp") - a).abs().max() < 1e-8


def test_angle_clamp_gradient_equals_finite_differences() -> None:
    p = (torch.randn(5, 5, dtype=torch.float64) * 0.4).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: clamp_angles(skew(p), 0.5, "cayley"), p)


def test_angle_clamp_gradient_is_finite_where_frequencies_coincide() -> None:
    a = torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]])] * 3).double().requires_grad_()
    clamp_angles(a, 0.5, "matrix_exp").pow(2).sum().backward()
    assert torch.isfinite(a.grad).all()


def test_angle_clamp_refuses_angles_cayley_cannot_reach() -> None:
    with pytest.raises(ConfigError, match="below pi"):
        clamp_angles(random_skew(4), 3.2, "cayley")
