"""The runtime against weights edited by the independent definition, and what users rely on around it."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from conftest import SHIPPED, TRAIT, logits_of, random_adapter, tiny_mixture, tiny_model
from oracle import edited_model
from transformers import GPT2Config, GPT2LMHeadModel

import ipissa
from ipissa import steering
from ipissa.adapter import VectorAdapter
from ipissa.adapter.base_model import block_names, describe_base
from ipissa.errors import AlphaError, BaseModelMismatchError, ConfigError
from ipissa.rotation import ROTATIONS
from ipissa.scaling import SCALE_MODES

ALPHAS = [-1.3, -0.5, 0.0, 0.37, 1.0]
IDS = torch.tensor([[5, 9, 33, 71, 12, 40], [7, 7, 80, 2, 19, 55]])
SIDES = [(True, False), (False, True), (True, True), (False, False)]
VARIANTS = [
    (method, mode, v, u) for method, mode, (v, u) in product(ROTATIONS, SCALE_MODES, SIDES) if v or u or mode != "none"
]


def assert_equals_edited_weights(model: Any, adapter: Any, ids: torch.Tensor) -> None:
    """In float32, against the definition in float64, within 1e-4 or twice the rounding of edited float32 weights.

    Those are off by more than 1e-4 themselves where a first token's hidden states are huge.
    """
    base = logits_of(model, ids)
    exact = copy.deepcopy(model).double()
    steered = ipissa.attach(model, adapter)
    for alpha in ALPHAS:
        with steered.alpha(alpha):
            found = logits_of(model, ids)
        if alpha == 0:
            assert torch.equal(found, base)
        else:
            edited = edited_model(exact, [(adapter, alpha)])
            expected = logits_of(edited, ids)
            rounding = float((logits_of(edited.float(), ids) - expected).abs().max())
            assert (found - expected).abs().max() <= max(1e-4, 2 * rounding)
            assert (found - base).abs().max() > 1e-3  # otherwise the test proves nothing
    steered.detach()


def test_runtime_equals_edited_weights_for_every_family(model: Any) -> None:
    assert_equals_edited_weights(model, random_adapter(model), IDS)


@pytest.mark.parametrize(("method", "mode", "v", "u"), VARIANTS)
def test_runtime_equals_edited_weights_for_every_variant(llama: Any, method: str, mode: str, v: bool, u: bool) -> None:
    adapter = random_adapter(llama, rank=7, rotation=method, scale_mode=mode, rotate_v=v, rotate_u=u)
    assert_equals_edited_weights(llama, adapter, IDS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_adapters_equal_edited_weights(demo: tuple[Any, Any], path: Any) -> None:
    model, tokenizer = demo
    ids = tokenizer("The honest answer is that I broke it. My choice:", return_tensors="pt").input_ids
    assert_equals_edited_weights(model, ipissa.load_adapter(path), ids)


def test_the_shipped_adapters_are_small() -> None:
    assert [path.stem for path in SHIPPED] == ["honest", "kind"]
    assert all(path.stat().st_size <= 12_000_000 for path in SHIPPED)


def test_each_row_of_a_batch_has_its_own_alpha(model: Any) -> None:
    adapter = random_adapter(model)
    ids = IDS[:1].expand(len(ALPHAS), -1)
    with ipissa.attach(model, adapter).alpha(ALPHAS):
        together = logits_of(model, ids)
    for row, alpha in enumerate(ALPHAS):
        expected = logits_of(edited_model(model, [(adapter, alpha)]), ids[:1])[0]
        assert (together[row] - expected).abs().max() <= 1e-4


def test_rows_at_zero_are_exactly_the_base_beside_steered_rows(llama: Any) -> None:
    base = logits_of(llama, IDS)
    with ipissa.attach(llama, random_adapter(llama)).alpha([0.0, 1.0]):
        assert torch.equal(logits_of(llama, IDS)[0], base[0])


def test_adapters_on_the_same_modules_add_up_each_at_its_own_alpha(model: Any) -> None:
    adapters = {"a": random_adapter(model, seed=1), "b": random_adapter(model, seed=2, rank=5, rotate_u=True)}
    steered = ipissa.attach(model, adapters)
    with steered.alpha({"a": 0.7, "b": [-0.4, 1.1]}):
        found = logits_of(model, IDS)
    for row, b in enumerate([-0.4, 1.1]):
        expected = logits_of(edited_model(model, [(adapters["a"], 0.7), (adapters["b"], b)]), IDS)[row]
        assert (found[row] - expected).abs().max() <= 1e-4


def test_detaching_leaves_the_model_bitwise_as_it_was(model: Any) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    base = logits_of(model, IDS)
    steered = ipissa.attach(model, random_adapter(model))
    steered.set_alpha(1.0)
    logits_of(model, IDS)
    steered.detach()
    assert torch.equal(logits_of(model, IDS), base)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_alpha_is_restored_after_the_block_and_after_an_exception(llama: Any) -> None:
    steered = ipissa.attach(llama, random_adapter(llama))
    base = logits_of(llama, IDS)
    with steered.alpha(0.5):
        at_half = logits_of(llama, IDS)
        with pytest.raises(RuntimeError), steered.alpha(1.0):
            raise RuntimeError
        assert torch.equal(logits_of(llama, IDS), at_half)
    assert torch.equal(logits_of(llama, IDS), base)


def test_generate_works_with_one_alpha_per_row(llama: Any) -> None:
    steered = ipissa.attach(llama, random_adapter(llama))
    ids = IDS[:1].expand(3, -1)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with steered.alpha([-1.0, 0.0, 1.0]):
        together = llama.generate(ids, **settings)
    for row, alpha in enumerate([-1.0, 0.0, 1.0]):
        with steered.alpha(alpha):
            alone = llama.generate(ids[:1], **{**settings, "attention_mask": torch.ones_like(ids[:1])})
        assert torch.equal(together[row], alone[0])


def test_bfloat16_follows_the_definition_as_closely_as_merged_weights_do() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    adapter = random_adapter(model)
    exact = logits_of(edited_model(tiny_model("llama"), [(random_adapter(tiny_model("llama")), 0.8)]), IDS)
    with ipissa.attach(model, adapter).alpha(0.8):
        ours = (logits_of(model, IDS).float() - exact).abs().mean()
    merged = (logits_of(edited_model(model, [(adapter, 0.8)]), IDS).float() - exact).abs().mean()
    assert ours < 1.5 * merged


@pytest.mark.parametrize(
    "bad",
    [float("nan"), float("inf"), True, "big", [0.1, float("nan")], [], None, pytest.param(10**400, id="huge"), 1e39],
)
def test_unusable_alpha_is_refused_and_changes_nothing(llama: Any, bad: Any) -> None:
    steered = ipissa.attach(llama, random_adapter(llama))
    base = logits_of(llama, IDS)
    with pytest.raises(AlphaError), steered.alpha(bad):
        pass
    assert torch.equal(logits_of(llama, IDS), base)


def test_large_batches_are_steered_alike_and_are_not_kept(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "ROWS_CACHED", 2)
    steered = ipissa.attach(llama, random_adapter(llama))
    ids = IDS[:1].expand(3, -1)
    with steered.alpha([0.1, 0.2, 0.3]):
        found = logits_of(llama, ids)
    assert steered._batches.cache_info().currsize == 0
    for row, alpha in enumerate((0.1, 0.2, 0.3)):
        with steered.alpha(alpha):
            assert (logits_of(llama, ids)[row] - found[row]).abs().max() < 1e-5
    assert steered._batches.cache_info().currsize == 3
    steered.detach()


def test_a_batch_of_another_size_than_the_alphas_is_refused(llama: Any) -> None:
    with ipissa.attach(llama, random_adapter(llama)).alpha([0.1, 0.2, 0.3]), pytest.raises(AlphaError, match="3 α"):
        logits_of(llama, IDS)


def test_rows_of_a_shared_expert_have_their_own_alpha_although_it_is_given_none() -> None:
    model = tiny_mixture()
    adapter = random_adapter(model, suffixes=("shared_expert.down_proj",))
    steered = ipissa.attach(model, adapter)
    with steered.alpha([0.7, -1.3]):
        together = logits_of(model, IDS)
    for row, alpha in enumerate([0.7, -1.3]):
        expected = logits_of(edited_model(model, [(adapter, alpha)]), IDS)[row]
        with steered.alpha(alpha):
            assert (logits_of(model, IDS)[row] - expected).abs().max() <= 1e-4
        assert (together[row] - expected).abs().max() <= 1e-4
    with steered.alpha([0.1, 0.2, 0.3, 0.4]), pytest.raises(AlphaError, match="4 α are set for a batch of 2 rows"):
        logits_of(model, IDS)  # although four divide its tokens
    with steered.alpha([0.7, -1.3]), pytest.raises(AlphaError, match="tokens without their rows; set one α for all"):
        model.model.layers[0].mlp.shared_expert(torch.ones(4, 32))
    steered.detach()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_steered_already_takes_more_adapters_and_is_merged_into(llama: Any) -> None:
    a, b = random_adapter(llama, seed=1), random_adapter(llama, seed=2)
    steered = ipissa.attach(llama, {"a": a})
    alphas = [6.0, 0.5]
    with steered.alpha(alphas):
        steered.add("b", b)
        other = ipissa.attach(llama, {"b": b})
        other.detach()
        ipissa.merge(llama, b, alpha=1.0)
        found = logits_of(llama, IDS)
    for row, alpha in enumerate(alphas):
        expected = logits_of(edited_model(tiny_model("llama"), [(a, alpha), (b, 1.0)]), IDS)[row]
        assert (found[row] - expected).abs().max() <= 2e-4


def test_a_model_may_be_spread_over_devices(llama: Any) -> None:
    adapter = random_adapter(llama)
    steered = ipissa.attach(llama, adapter)
    steered.set_alpha([0.5, -1.0])
    whole = {name: coefficients for name, [(_, coefficients)] in steered._now.items()}
    steered.detach()
    elsewhere = list(adapter.modules)[1]  # one that `check_base` does not run
    llama.get_submodule(elsewhere).to("meta")
    steered = ipissa.attach(llama, adapter)
    steered.set_alpha([0.5, -1.0])
    for name, [(_, (found,))] in steered._now.items():
        (expected,) = whole[name]
        assert found.device.type == ("meta" if name == elsewhere else "cpu")
        assert found.shape == expected.shape
        assert name == elsewhere or torch.equal(found, expected)


@pytest.mark.parametrize("name", ["", "model", "model.layers", "model.layers.1.mlp", "model.layers.1.mlp.act_fn"])
def test_a_vector_is_added_to_blocks_and_linear_layers_only(llama: Any, name: str) -> None:
    vector = VectorAdapter(modules={name: torch.ones(32)}, base_model=describe_base(llama, "tiny"), trait=dict(TRAIT))
    with pytest.raises(BaseModelMismatchError, match="neither a decoder block nor a linear layer"):
        ipissa.attach(llama, vector)
    for known in ("model.layers.1", "model.layers.1.mlp.down_proj"):
        ipissa.attach(llama, replace(vector, modules={known: torch.ones(32)})).detach()


def test_an_architecture_without_layers_is_named() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"Models of type 'gpt2' have no decoder.layers"):
        block_names(model)


def test_unknown_names_and_nameless_numbers_are_refused(llama: Any) -> None:
    steered = ipissa.attach(llama, {"a": random_adapter(llama), "b": random_adapter(llama, seed=1)})
    with pytest.raises(AlphaError, match="'c'"), steered.alpha({"c": 1.0}):
        pass
    with pytest.raises(AlphaError, match="Name the adapter"), steered.alpha(1.0):
        pass


def test_another_base_model_is_refused_and_nothing_stays_attached(llama: Any) -> None:
    adapter = random_adapter(llama)
    other_family, other_weights = tiny_model("gemma3"), tiny_model("llama", seed=9)
    with pytest.raises(BaseModelMismatchError, match="shape"):
        ipissa.attach(other_family, adapter)
    with pytest.raises(BaseModelMismatchError, match="singular vectors"):
        ipissa.attach(other_weights, {"fits not": adapter})
    assert not any(module._forward_hooks for module in other_weights.modules())


def test_phases_are_cached_within_bounds(llama: Any) -> None:
    steered = ipissa.attach(llama, {"a": random_adapter(llama)}, cache_size=4)
    for alpha in [0.1, 0.2, 0.1, 0.3, 0.4, 0.5, 0.6]:
        steered.set_alpha(alpha)
    info = steered.phase_cache_info()["a"]
    assert (info.currsize, info.maxsize) == (4, 4)
    assert info.misses == 6


def test_ten_thousand_alphas_leave_memory_where_it_was(llama: Any) -> None:
    steered = ipissa.attach(llama, {"a": random_adapter(llama)})

    def tensors_after(alphas: range) -> int:
        for i in alphas:
            steered.set_alpha([i / 7, -i / 7])
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    assert tensors_after(range(300, 5300)) == tensors_after(range(5300, 10300))


@pytest.mark.parametrize("modes", [("add2", "add2"), ("add2", "none"), ("add2", "mult"), ("mult", "mult")])
def test_adapters_side_by_side_equal_their_summed_weights(llama: Any, modes: tuple[str, str]) -> None:
    """Those that can share products and those that cannot, on the same layers and on different ones."""
    a = random_adapter(llama, scale_mode=modes[0])
    b = random_adapter(llama, scale_mode=modes[1], seed=1, rank=4, suffixes=("o_proj", "up_proj"))
    with ipissa.attach(llama, {"a": a, "b": b}).alpha({"a": [0.5, -1.3], "b": 0.8}):
        found = logits_of(llama, IDS)
    for row, alpha in enumerate([0.5, -1.3]):
        expected = logits_of(edited_model(llama, [(a, alpha), (b, 0.8)]), IDS)[row]
        assert (found[row] - expected).abs().max() <= 1e-4
