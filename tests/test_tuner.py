"""InnerPiSSA as a PEFT tuner: one table of configurations drives forward, save, load, disable and merge."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import TRAIT, logits_of, random_adapter, tiny_mixture, tiny_model
from oracle import edited_model
from safetensors.torch import load, save_file
from torch import Tensor

import ipissa
from ipissa.adapter import InnerPissaConfig, InnerPissaLayer, layer_alpha
from ipissa.adapter.base_model import describe_base
from ipissa.adapter.config import PEFT_TYPE
from ipissa.adapter.convert import from_peft_folder, from_peft_model, to_peft_folder
from ipissa.adapter.delta import delta_core
from ipissa.adapter.dial import add_dial
from ipissa.errors import AdapterFileError, AlphaError, ConfigError
from ipissa.rotation import CLAMPS
from ipissa.scaling import scaled_singular_values
from ipissa.train import TrainConfig

IDS = torch.tensor([[5, 9, 33, 71, 12, 40], [7, 7, 80, 2, 19, 55]])
LEARNT = {"directions": "learnt", "scale_mode": "none", "clamp": "none"}
CONFIGS = {
    "default": {},
    "matrix_exp": {"rotation": "matrix_exp"},
    "angles": {"clamp": "angles"},
    "unclamped": {"clamp": "none"},
    "add_tanh": {"scale_mode": "add_tanh"},
    "mult": {"scale_mode": "mult"},
    "no scale": {"scale_mode": "none"},
    "both sides": {"rotate_u": True},
    "output side": {"rotate_u": True, "rotate_v": False},
    "scale only": {"rotate_v": False},
    "odd rank": {"r": 5},
    "rank beyond the module": {"r": 500},
    "learnt": LEARNT,
    "learnt, matrix_exp": {**LEARNT, "rotation": "matrix_exp"},
    "learnt, rank beyond the module": {**LEARNT, "r": 500},
}


def wrapped(family: str = "llama", **config: Any) -> Any:
    """A PEFT model with parameters far enough from zero to matter."""
    settings = {"r": 8, "target_modules": ["q_proj", "o_proj", "down_proj"], **config}
    model = peft.get_peft_model(tiny_model(family), InnerPissaConfig(**settings)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "innerpissa" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def peft_model(request: pytest.FixtureRequest) -> Any:
    return wrapped(**request.param)


def test_registering_leaves_pefts_enum_alone() -> None:
    assert PEFT_TYPE not in list(peft.PeftType)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is InnerPissaConfig


def test_the_triples_are_those_of_the_largest_singular_values_and_rebuild_the_best_approximation() -> None:
    model = tiny_model("llama").requires_grad_(False)
    weight = model.model.layers[0].self_attn.o_proj.weight.double().clone()
    U, S, Vh = torch.linalg.svd(weight)
    best = U[:, :8] * S[:8] @ Vh[:8]
    adapted = peft.get_peft_model(model, InnerPissaConfig(r=8, target_modules=["o_proj"]))
    layer = adapted.base_model.model.model.layers[0].self_attn.o_proj
    found = [getattr(layer, f"innerpissa_{name}")["default"].double() for name in "USV"]
    assert found[1].tolist() == pytest.approx(S[:8].tolist(), rel=1e-4)
    rebuilt = found[0] * found[1] @ found[2].T
    assert (rebuilt - best).norm() < 1e-5 * best.norm()


def test_the_layer_equals_weights_edited_by_the_definition(peft_model: Any) -> None:
    base = tiny_model("llama")
    adapter = from_peft_model(peft_model, base_model=describe_base(base, "tiny"), trait=TRAIT)
    for alpha in (-1.3, 0.4, 1.0):
        with layer_alpha(peft_model, alpha):
            found = logits_of(peft_model, IDS)
        expected = logits_of(edited_model(base, [(adapter, alpha)]), IDS)
        assert (found - expected).abs().max() <= 1e-4
        assert (found - logits_of(base, IDS)).abs().max() > 1e-3


def test_alpha_zero_and_disabled_are_exactly_the_base(peft_model: Any) -> None:
    base = logits_of(tiny_model("llama"), IDS)
    with layer_alpha(peft_model, 0.0):
        assert torch.equal(logits_of(peft_model, IDS), base)
    with peft_model.disable_adapter():
        assert torch.equal(logits_of(peft_model, IDS), base)


def test_rows_may_have_their_own_alpha(peft_model: Any) -> None:
    with layer_alpha(peft_model, torch.tensor([-0.5, 0.9])):
        together = logits_of(peft_model, IDS)
    for row, alpha in enumerate([-0.5, 0.9]):
        with layer_alpha(peft_model, alpha):
            torch.testing.assert_close(logits_of(peft_model, IDS)[row], together[row], atol=1e-5, rtol=1e-5)


def test_saving_and_loading_with_peft_keeps_logits(peft_model: Any, tmp_path: Path) -> None:
    peft_model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits_of(loaded, IDS), logits_of(peft_model, IDS))


def test_chosen_triples_are_saved_with_what_turns_them(tmp_path: Path) -> None:
    model = wrapped()
    layers = [module for module in model.modules() if isinstance(module, InnerPissaLayer)]
    for layer in layers:
        layer.keep_triples("default", torch.arange(3, 11))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits_of(loaded, IDS), logits_of(model, IDS))
    for layer in layers:
        layer.keep_triples("default", torch.arange(8))
    assert (logits_of(loaded, IDS) - logits_of(model, IDS)).abs().max() > 1e-3  # others would be seen


def test_merging_equals_and_unmerging_is_exact(peft_model: Any) -> None:
    base = {name: value.clone() for name, value in peft_model.state_dict().items()}
    expected = logits_of(peft_model, IDS)
    peft_model.merge_adapter(safe_merge=True)
    assert (logits_of(peft_model, IDS) - expected).abs().max() <= 1e-4
    peft_model.unmerge_adapter()
    assert all(torch.equal(value, base[name]) for name, value in peft_model.state_dict().items())
    merged = peft_model.merge_and_unload()
    assert not any(isinstance(module, InnerPissaLayer) for module in merged.modules())
    assert (logits_of(merged, IDS) - expected).abs().max() <= 1e-4


def test_the_peft_form_and_the_file_convert_both_ways(peft_model: Any, tmp_path: Path) -> None:
    base = tiny_model("llama")
    adapter = from_peft_model(peft_model, base_model=describe_base(base, "tiny"), trait=TRAIT)
    ipissa.save_adapter(adapter, tmp_path / "a.safetensors")
    to_peft_folder(ipissa.load_adapter(tmp_path / "a.safetensors"), tmp_path / "peft")
    back = from_peft_folder(tmp_path / "peft")
    assert back.modules.keys() == adapter.modules.keys()
    assert (back.trait, back.alpha_range, back.base_model) == (adapter.trait, adapter.alpha_range, adapter.base_model)
    for name, factors in adapter.modules.items():
        for key, value in factors.tensors().items():
            torch.testing.assert_close(back.modules[name].tensors()[key], value)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    assert (logits_of(loaded, IDS) - logits_of(peft_model, IDS)).abs().max() <= 1e-4


def test_an_adapter_that_is_not_there_cannot_be_taken(peft_model: Any) -> None:
    with pytest.raises(ConfigError, match="holds no InnerPiSSA adapter 'other'"):
        from_peft_model(peft_model, adapter_name="other", base_model={}, trait={})


@pytest.mark.parametrize(
    ("tensors", "description", "says"),
    [
        ({"d": torch.full((8,), math.nan)}, {}, "holds NaN or infinite values"),
        ({"d": torch.ones(7)}, {}, r"has shape \(7,\), expected \(8,\)"),
        ({"p_v": torch.ones(7, 8)}, {}, r"has shape \(7, 8\), expected \(8, 8\)"),
        ({"p_v": None}, {}, r"lacks the tensor .*o_proj.innerpissa_p_v"),
        ({"d": None}, {}, r"lacks the tensor .*o_proj.innerpissa_d"),
        ({"p_u": torch.ones(8, 8)}, {}, r"holds the tensor .*o_proj.innerpissa_p_u', which .* does not ask for"),
        ({"q": torch.ones(8)}, {}, r"holds the tensor .*o_proj.innerpissa_q', which .* does not ask for"),
        ({}, {"alpha_range": [5, 7]}, "not an interval around 0"),
        ({}, {"alpha_range": ["a", "b"]}, "metadata that cannot be used"),
        ({}, {"alpha_range": [-1, 2, 3]}, "metadata that cannot be used"),
        ({}, {"alpha_range": None}, r"lacks \['alpha_range'\]"),
        ({}, {"trait": {}}, "in its trait metadata"),
        ({}, {"base_model": 3}, "metadata that cannot be used"),
        ({}, {"licence": "mit"}, "is not a PEFT folder .* 'licence'"),
    ],
)
def test_a_peft_folder_is_read_as_strictly_as_a_file(
    tmp_path: Path, tensors: dict[str, Tensor | None], description: dict[str, Any], says: str
) -> None:
    adapter = random_adapter(tiny_model("llama"), suffixes=("layers.1.self_attn.o_proj",), rank=8)
    folder = to_peft_folder(adapter, tmp_path / "peft")
    named = {f"base_model.model.{next(iter(adapter.modules))}.innerpissa_{key}": t for key, t in tensors.items()}
    weights, words = folder / "adapter_model.safetensors", folder / "ipissa.json"
    save_file(_with(load(weights.read_bytes()), named), weights)
    words.write_text(json.dumps(_with(json.loads(words.read_text()), description)))
    with pytest.raises(AdapterFileError, match=says):
        from_peft_folder(folder)


def _with(found: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Some replaced, and those that are None left out."""
    return {key: value for key, value in (found | others).items() if value is not None}


def test_two_adapters_switch_and_only_the_active_one_trains() -> None:
    model = wrapped()
    model.add_adapter("second", InnerPissaConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]))
    model.set_adapter("second")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".second" in name and "innerpissa" in name for name in trainable)


def test_initial_parameters_make_plus_and_minus_one_differ_and_zeros_do_not() -> None:
    for std, directions, differs in ((0.002, "triples", True), (0.002, "learnt", True), (0.0, "triples", False)):
        settings = {**LEARNT, "directions": directions, "init_std": std}
        config = InnerPissaConfig(r=8, target_modules=["o_proj"], **settings)
        model = peft.get_peft_model(tiny_model("llama"), config).eval()
        with layer_alpha(model, torch.tensor([1.0, -1.0])):
            plus, minus = logits_of(model, IDS[:1].expand(2, -1))
        assert (not torch.equal(plus, minus)) is differs


def test_factors_of_a_bfloat16_base_stay_float32() -> None:
    model = peft.get_peft_model(tiny_model("llama").bfloat16(), InnerPissaConfig(r=8, target_modules=["o_proj"]))
    layers = [module for module in model.modules() if isinstance(module, InnerPissaLayer)]
    for layer in layers:
        U, S, V = (getattr(layer, f"innerpissa_{name}")["default"] for name in "USV")
        W = layer.base_layer.weight.detach().float()
        assert (U.T @ U - torch.eye(8)).abs().max() < 1e-5
        assert (W @ V - U * S).abs().max() < 1e-5
    assert layers


@pytest.mark.parametrize("config", [{"rotate_u": True}, LEARNT], ids=["triples", "learnt"])
def test_gradients_reach_every_trainable_parameter_and_no_other(config: dict[str, Any]) -> None:
    model = wrapped(**config)
    with layer_alpha(model, torch.tensor([1.0, -1.0])):
        model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("innerpissa" in name), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("config", [{"rotate_u": True}, LEARNT], ids=["triples", "learnt"])
def test_the_layer_adds_nothing_at_zero_where_products_are_computed_in_bfloat16(config: dict[str, Any]) -> None:
    layer = next(m for m in wrapped(**config).modules() if isinstance(m, InnerPissaLayer))
    alpha = torch.tensor([0.0, 1.0])
    exact = layer.core("default", alpha)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.core("default", alpha)
    assert not found[0].any()
    assert torch.equal(found, exact)


def test_a_layer_whose_tokens_have_no_rows_takes_one_alpha_and_refuses_several() -> None:
    base = tiny_mixture()
    settings = {"r": 4, "target_modules": ["shared_expert.down_proj"], "init_std": 0.3}
    model = peft.get_peft_model(tiny_mixture(), InnerPissaConfig(**settings)).eval()
    adapter = from_peft_model(model, base_model=describe_base(base, "tiny"), trait=TRAIT)
    with layer_alpha(model, 0.7):
        assert (logits_of(model, IDS) - logits_of(edited_model(base, [(adapter, 0.7)]), IDS)).abs().max() <= 1e-4
    with layer_alpha(model, torch.tensor([0.7, 0.1])), pytest.raises(AlphaError, match="12 tokens without their rows"):
        logits_of(model, IDS)


def test_the_layers_alpha_is_restored_after_an_exception() -> None:
    model = wrapped()
    with pytest.raises(RuntimeError), layer_alpha(model, 0.3):
        raise RuntimeError
    assert {m.alpha for m in model.modules() if isinstance(m, InnerPissaLayer)} == {1.0}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"rotation": "spin"}, "rotation 'spin' is unknown; use one of cayley"),
        ({"clamp": "hard"}, "clamp 'hard'"),
        ({"scale_mode": "add"}, "scale_mode 'add'"),
        ({"r": 1}, "at least 2"),
        ({"directions": "seen"}, "directions 'seen' is unknown; use one of triples, learnt"),
        ({**LEARNT, "r": 7}, "r 7 is odd"),
        ({**LEARNT, "rotate_u": True}, "learnt directions need False"),
        ({**LEARNT, "scale_mode": "add2"}, "scale_mode 'add2' is for singular triples"),
        ({**LEARNT, "clamp": "entries"}, "clamp 'entries' is for singular triples"),
        ({**LEARNT, "max_rotation": 0.5}, "max_rotation 0.5 is for singular triples"),
        ({"max_rotation": 0}, "max_rotation 0 is no limit; use clamp 'none'"),
        ({"max_rotation": float("inf")}, "max_rotation inf is no limit; use clamp 'none'"),
        ({"clamp": "angles", "max_rotation": 3.2}, "max_rotation 3.2 is not below pi"),
        ({"rotate_v": False, "scale_mode": "none"}, "nothing would be trained"),
    ],
)
def test_unusable_configurations_are_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        InnerPissaConfig(**bad)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_dora_have_the_same_dial(dora: bool) -> None:
    """α = 1 is the tuned layer, 0 the base, -1 its mirror image; rows of one batch have their own."""
    model = tiny_model("llama").requires_grad_(False)
    ids = torch.tensor([[5, 6, 7, 8]])
    base = logits_of(model, ids)
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=["o_proj"], layers_to_transform=[3], init_lora_weights=False, use_dora=dora
    )
    wrapped = peft.get_peft_model(model, lora)
    tuned = logits_of(wrapped, ids)
    add_dial(wrapped)
    layer = wrapped.base_model.model.model.layers[3].self_attn.o_proj
    x = torch.randn(3, 2, layer.in_features)
    with layer_alpha(wrapped, torch.tensor([1.0, 0.0, -1.0])), torch.no_grad():
        one, zero, minus = layer(x[:1].expand(3, -1, -1))
    assert torch.equal(logits_of(wrapped, ids), tuned)
    assert (one - zero + minus - zero).abs().max() < 1e-5
    assert (one - zero).abs().max() > 1e-3
    with layer_alpha(wrapped, 0.0):
        assert (logits_of(wrapped, ids) - base).abs().max() < 1e-6
    with layer_alpha(wrapped, torch.tensor([-1.0])):
        wrapped(input_ids=ids).logits.sum().backward()
    gradients = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert gradients
    assert all(g is not None and g.isfinite().all() for g in gradients)


ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        (("residual",), {"o_proj", "down_proj"}),
        (("attention",), ATTENTION),
        (("mlp",), MLP),
        (("all",), ATTENTION | MLP),
        (("q_proj", "mlp"), {"q_proj"} | MLP),
    ],
)
def test_module_sets_name_the_layers_they_say(modules: tuple[str, ...], names: set[str]) -> None:
    config = TrainConfig("a", "b", target_modules=modules, depth_start=0.3)
    found = config.adapter_config(30)
    assert set(found.target_modules) == names
    model = peft.get_peft_model(tiny_model("llama", blocks=30).requires_grad_(False), found)
    adapted = [name for name, module in model.named_modules() if isinstance(module, InnerPissaLayer)]
    assert {name.rpartition(".")[2] for name in adapted} == names
    assert len(adapted) == 18 * len(names)  # of 30 blocks 9 to 26


def test_the_example_of_the_sources_adapts_36_residual_writers() -> None:
    config = TrainConfig("a", "b", depth_start=0.3, depth_end=0.95, objective="contrastive").adapter_config(30)
    assert config.layers_to_transform == [block for block in range(9, 28) if block != 24]
    model = peft.get_peft_model(tiny_model("llama", blocks=30).requires_grad_(False), config)
    assert sum(isinstance(module, InnerPissaLayer) for module in model.modules()) == 36


def test_blocks_of_a_range_may_be_fewer_and_leave_out_those_of_the_loss() -> None:
    config = TrainConfig("a", "b", depth_start=0.3, objective="contrastive")
    assert config.adapter_config(30).layers_to_transform == [block for block in range(9, 27) if block != 24]
    some = TrainConfig("a", "b", depth_start=0.3, depth_count=3).adapter_config(30).layers_to_transform
    assert some == [9, 15, 21]
    assert TrainConfig("a", "b", depth_count=99).adapter_config(30).layers_to_transform == list(range(6, 27))


def test_the_adapter_has_a_square_per_rotated_side_and_a_vector_for_scaling() -> None:
    for sides, scale, expected in ((1, "add2", 64 + 8), (2, "add2", 2 * 64 + 8), (1, "none", 64)):
        config = InnerPissaConfig(r=8, target_modules=["o_proj"], rotate_u=sides == 2, scale_mode=scale)
        wrapped = peft.get_peft_model(tiny_model("llama").requires_grad_(False), config)
        layers = wrapped.base_model.model.config.num_hidden_layers
        assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == layers * expected


def test_what_both_poles_share_is_of_second_order_and_grows_with_the_clamp() -> None:
    """D(α) + D(-α) = α² V (I - X²)⁻¹ [A² S + 2 A d] Uᵀ with X = α A / 2: how far the dial is from odd.

    Relative to S and to D itself, for entries clamped at 0.1, 0.3, 0.5 and not at all.
    """
    generator = torch.Generator().manual_seed(0)
    s = torch.linspace(9, 1, 12).double()
    d = 0.1 * torch.randn(12, generator=generator).double()
    p = torch.randn(12, 12, generator=generator).double()
    shares = []
    for clamp in (0.1, 0.3, 0.5, math.inf):
        A = (p - p.T) if clamp == math.inf else CLAMPS["entries"](p - p.T, clamp, "cayley")
        for alpha in (0.5, 1.0):
            poles = delta_core(
                s, A, None, d, torch.tensor([alpha, -alpha]).double(), rotation="cayley", scale_mode="add2"
            )
            X = alpha * A / 2
            inverse = torch.linalg.inv(torch.eye(12).double() - X @ X)
            expected = alpha**2 * inverse @ (A @ A * s + 2 * A * d)
            assert (poles.sum(0) - expected).abs().max() < 1e-10
        shares.append((float(poles.sum(0).norm() / s.norm()), float(poles.sum(0).norm() / poles[0].norm())))
    assert all(list(column) == sorted(column) for column in zip(*shares, strict=True))
    assert shares[0][1] < 0.5 < shares[2][1]


def test_rejected_ways_to_scale_are_less_symmetric_than_add2() -> None:
    """|S(α) + S(-α) - 2S| / |S(α) - S(-α)| at α = 1, for changes of the singular values' own size.

    The sources rejected exp(αd) and values cut off at zero for this. A third, a base kept separate from
    the adapted part, cannot be written in delta form, whose base is the layer itself.
    """
    s = torch.tensor([3.0, 2.0, 1.0, 0.5])
    d = torch.tensor([0.3, -0.8, 1.5, -0.9])

    def scaled(mode: str, alpha: float) -> Tensor:
        return scaled_singular_values(s, d, torch.tensor([alpha]), mode=mode)[0]

    ways = {
        **{mode: partial(scaled, mode) for mode in ("add2", "add_tanh", "mult")},
        "hard clip": lambda alpha: (s + alpha * d).clamp(min=0),
    }
    asymmetry = {
        name: float((way(1.0) + way(-1.0) - 2 * way(0.0)).norm() / (way(1.0) - way(-1.0)).norm())
        for name, way in ways.items()
    }
    assert max(asymmetry["add2"], asymmetry["add_tanh"]) < 1e-6
    assert min(asymmetry["mult"], asymmetry["hard clip"]) > 0.1
