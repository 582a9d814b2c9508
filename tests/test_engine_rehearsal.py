"""Models that slots or split layers would make say something else are refused, or run unsplit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FAMILIES, random_adapter, tiny_model
from ipissa_server.engine.cache import SlotCache
from ipissa_server.engine.runner import Runner
from odd_models import model_of

import ipissa
from ipissa.errors import ConfigError

IDS = [5, 6, 7, 8, 9]


def runner_for(model: Any, **adapters: Any) -> Runner:
    return Runner(ipissa.attach(model, adapters), SlotCache(1000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["stablelm", "nemotron", "xglm", "diffllama", "recurrent_gemma"])
def test_models_whose_attention_passes_the_slots_by_are_refused(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=f"cannot run models of type {kind}: .* Use --engine vllm"):
        runner_for(model_of(kind, dtype))


@pytest.mark.parametrize("kind", ["gpt2", "llama4_text"])
def test_models_without_a_list_of_layers_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot run models of type {kind}: .*no list named `layers`"):
        runner_for(model_of(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_models_that_are_tested_pass_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    adapter = random_adapter(tiny_model(family), suffixes=("layers.2.mlp.down_proj",))
    assert runner_for(model, honest=adapter).shared == 2


@pytest.mark.parametrize(("kind", "shared"), [("gemma4_text", 2), ("gemma3n_text", 0), ("afmoe", 2)])
def test_layers_that_read_more_than_hidden_states_are_split_right_or_not_at_all(kind: str, shared: int) -> None:
    """Gemma 4's read the token ids, Gemma 3n's the keys of others; AFMoE wants what attention gives in one piece."""
    model = model_of(kind)
    (name,) = (name for name, _ in model.named_modules() if name.endswith("layers.2.self_attn.o_proj"))
    adapter = random_adapter(model, suffixes=(name,))
    alphas = [-1.0, 0.0, 1.0]
    with ipissa.attach(model, {"honest": adapter}).alpha(alphas), torch.no_grad():
        expected = model(input_ids=torch.tensor([IDS] * 3), use_cache=False).logits[:, -1]
    model = model_of(kind)
    runner = runner_for(model, honest=adapter)
    hidden = runner.shared_hidden_states([IDS], len(IDS))
    found = runner.continue_from(
        hidden[torch.tensor([0, 0, 0])], [{"honest": alpha} for alpha in alphas], ([0, 1, 2], [len(IDS) - 1] * 3)
    )
    assert runner.shared == shared
    assert (expected[2] - expected[0]).abs().max() > 1e-2
    assert (found - expected).abs().max() <= 1e-4


def test_what_breaks_in_slots_is_told_in_one_sentence() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def breaking(*args: Any, slots: Any = None, **more: Any) -> Any:
        if slots is not None:
            raise RuntimeError("No.\nTry views.")
        return forward(*args, **more)

    attention.forward = breaking
    with pytest.raises(ConfigError, match=r"models of type llama: RuntimeError: No\. Use --engine vllm"):
        runner_for(model)


def test_an_error_that_passes_is_no_fault_of_the_model() -> None:
    model = tiny_model("llama")
    adapter = random_adapter(model, suffixes=("layers.2.mlp.down_proj",))
    runner = runner_for(model)
    attention = model.model.layers[2].self_attn
    forward = attention.forward

    def once(*args: Any, **more: Any) -> Any:
        attention.forward = forward
        raise RuntimeError("not enough memory")

    for expected in (0, 2):
        attention.forward = once if expected == 0 else forward
        runner.steered.add(f"from {expected}", adapter)
        runner.find_shared_layers()
        assert runner.shared == expected


def test_numbers_that_overflow_by_themselves_are_no_fault_of_slots() -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(torch.nan)
    assert runner_for(model).shared == 3
