"""Learnt directions against the rotation of all of a layer's input, written out in float64."""

import pytest
import torch
from conftest import tiny_model
from peft import get_peft_model
from torch import nn

from ipissa.adapter import InnerPissaConfig, layer_alpha
from ipissa.adapter.convert import from_peft_folder, from_peft_model
from ipissa.adapter.delta import delta_core
from ipissa.adapter.frame import frame_core, frame_factors, frame_of, images, initial_frame
from ipissa.errors import AdapterFileError
from ipissa.rotation import ROTATIONS

ALPHAS = torch.tensor([-2.0, -0.3, 0.0, 1.0, 3.0], dtype=torch.float64)


@pytest.fixture(params=[(10, 16, 6), (16, 10, 10)], ids=["wide", "tall"])
def layer(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (d_out, d_in) and a frame of r columns, X and Y of about the same size."""
    d_out, d_in, r = request.param
    torch.manual_seed(0)
    parameter = initial_frame(d_in, r, 0.02) + 0.03 * torch.randn(2, d_in, r // 2)
    return torch.randn(d_out, d_in).double(), frame_of(parameter.double())


def turned(weight: torch.Tensor, frame: torch.Tensor, rotation: str) -> torch.Tensor:
    """W R(α)ᵀ for every α, from the whole generator A = X Yᵀ - Y Xᵀ (d_in, d_in)."""
    x, y = frame.chunk(2, dim=1)
    return weight @ ROTATIONS[rotation](x @ y.mT - y @ x.mT, ALPHAS).mT


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_the_core_of_rank_r_is_the_whole_rotation(layer: tuple[torch.Tensor, torch.Tensor], rotation: str) -> None:
    weight, frame = layer
    delta = (weight @ frame) @ frame_core(frame, ALPHAS, rotation=rotation).mT @ frame.mT
    expected = turned(weight, frame, rotation) - weight
    assert (delta - expected).abs().max() < 1e-12
    assert expected[0].norm() > 0.3 * weight.norm()
    assert torch.equal(delta[2], torch.zeros_like(weight))


def test_a_turned_weight_keeps_its_singular_values(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, frame = layer
    for each in turned(weight, frame, "cayley"):
        assert (torch.linalg.svdvals(each) - torch.linalg.svdvals(weight)).abs().max() < 1e-12


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_the_files_triples_are_the_same_rotation(layer: tuple[torch.Tensor, torch.Tensor], rotation: str) -> None:
    weight, frame = layer
    u, s, v, a = frame_factors(weight, frame)
    one = torch.eye(frame.shape[1], dtype=torch.float64)
    assert (v.mT @ v - one).abs().max() < 1e-12
    assert (u.mT @ u - one).abs().max() < 1e-12
    assert (weight @ v - u * s).abs().max() < 1e-12
    delta = u @ delta_core(s, a, None, None, ALPHAS, rotation=rotation, scale_mode="none").mT @ v.mT
    assert (weight + delta - turned(weight, frame, rotation)).abs().max() < 1e-12


def test_gradients_of_the_images_are_those_of_a_plain_product() -> None:
    torch.manual_seed(0)
    linear, directions = nn.Linear(7, 5), torch.randn(7, 4, requires_grad=True)
    upstream = torch.randn(5, 4)
    for dtype in (torch.float32, torch.bfloat16):
        linear.to(dtype)
        found = images(linear, linear.weight, directions)
        (gradient,) = torch.autograd.grad(found, directions, upstream)
        assert torch.equal(found, linear.weight.float() @ directions)
        assert torch.allclose(gradient, linear.weight.float().mT @ upstream)


def test_a_layer_whose_weight_is_packed_is_asked_for_the_images() -> None:
    """As quantised layers are: what is stored is integers, what they do is a product."""

    class Packed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.float() / 8, self.bias)

    packed = Packed(6, 3).requires_grad_(False)
    packed.weight = nn.Parameter(torch.arange(18).reshape(3, 6).to(torch.int8), requires_grad=False)
    directions = torch.randn(6, 2)
    found = images(packed, packed.weight, directions)
    assert torch.allclose(found, packed.weight.float() / 8 @ directions, atol=1e-5)


def test_one_learning_rate_suits_every_width() -> None:
    """A step of Adam moves each parameter by the rate: it turns as far in a layer of any width."""
    for d_in in (64, 4096):
        torch.manual_seed(0)
        before = initial_frame(d_in, 8, 0.0)
        step = before.clone()
        step[1] += 1e-3 * torch.randn(d_in, 4).sign()
        x, y = frame_of(step).double().chunk(2, dim=1)
        largest = torch.linalg.matrix_norm(x @ y.mT - y @ x.mT, ord=2)
        assert 0.02 <= float(largest) < 0.05


def test_what_peft_saves_of_learnt_directions_is_no_adapter_without_the_base_model(tmp_path) -> None:
    config = InnerPissaConfig(r=4, target_modules=["o_proj"], directions="learnt", scale_mode="none", clamp="none")
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    (tmp_path / "ipissa.json").write_text("{}")
    with pytest.raises(AdapterFileError, match="load it with PEFT and pass the model to from_peft_model"):
        from_peft_folder(tmp_path)


def test_an_adapter_can_be_taken_while_it_is_merged() -> None:
    torch.manual_seed(0)
    config = InnerPissaConfig(
        r=4, target_modules=["o_proj"], directions="learnt", scale_mode="none", clamp="none", init_std=0.1
    )
    model = get_peft_model(tiny_model("llama"), config)
    apart = from_peft_model(model, base_model={}, trait={})
    with layer_alpha(model, 1.5):
        model.merge_adapter()
    merged = from_peft_model(model, base_model={}, trait={})
    for name, factors in apart.modules.items():
        for one, other in zip(factors.tensors().values(), merged.modules[name].tensors().values(), strict=True):
            assert torch.equal(one, other)
