"""Loading base models: quantised weights, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import random_adapter, tiny_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import ipissa
from ipissa.adapter import InnerPissaConfig, layer_alpha
from ipissa.adapter.base_model import check_base_files
from ipissa.errors import BaseModelMismatchError, ConfigError
from ipissa.models import QUANTISED
from ipissa.train import TrainConfig, train

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def saved(tokenizer: Any, tmp_path: Path) -> Path:
    """A model whose layers are wide enough for blocks of 64 weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_adapter_on_a_4bit_base_splits_the_dequantised_weight(saved: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="optional: pip install ipissa[quantised]")
    whole, _ = ipissa.load_model(str(saved), device="cpu", dtype="float32")
    model, _ = ipissa.load_model(str(saved), device="cpu", dtype="4bit")
    model.requires_grad_(False)
    with torch.no_grad():
        base = model(input_ids=IDS).logits
    wrapped = peft.get_peft_model(model, InnerPissaConfig(r=8, target_modules=["o_proj", "down_proj"]))
    layer = wrapped.base_model.model.model.layers[1].mlp.down_proj
    U, S, V = (part["default"] for part in (layer.innerpissa_U, layer.innerpissa_S, layer.innerpissa_V))
    W = whole.model.layers[1].mlp.down_proj.weight
    assert 0.001 < (W @ V - U * S).norm() / S.norm() < 0.1  # what quantisation explains, and no more
    with layer_alpha(wrapped, 0.0), torch.no_grad():
        assert torch.equal(wrapped(input_ids=IDS).logits, base)


def test_unusable_storage_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="use auto, fast, float32, bfloat16, float16, 4bit, 8bit"):
        ipissa.load_model(str(saved), dtype="2bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for dtype in QUANTISED:
        with pytest.raises(ConfigError, match="needs bitsandbytes"):
            ipissa.load_model(str(saved), dtype=dtype)


@pytest.mark.parametrize(
    ("cpu", "asked", "held"),
    [
        ({"avx512_bf16": True}, "fast", torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, "fast", torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, "fast", torch.float32),
        ({"avx512_bf16": True}, "auto", torch.float32),
    ],
)
def test_bfloat16_is_used_where_the_cpu_computes_in_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch, cpu: dict[str, bool], asked: str, held: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    model, _ = ipissa.load_model(str(saved), device="cpu", dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {held}


def test_training_on_quantised_weights_is_refused_on_the_cpu(tmp_path: Path) -> None:
    """bitsandbytes has no gradients through its CPU kernels."""
    config = TrainConfig("kind", "angry", dtype="4bit", device="cpu")
    with pytest.raises(ConfigError, match="dtype '4bit' can be trained on CUDA only"):
        train(config, tmp_path / "kind.safetensors")


def test_8bit_weights_are_refused_on_the_cpu(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="'8bit' runs on CUDA only"):
        ipissa.load_model(str(saved), device="cpu", dtype="8bit")


def test_an_adapter_is_matched_to_the_files_of_a_model_that_is_not_loaded(tmp_path: Path) -> None:
    made_for, other_shape = tiny_model("llama"), tiny_model("llama", vocab_size=98)
    retrained = tiny_model("llama", seed=1)
    for name, model in (("made_for", made_for), ("other_shape", other_shape), ("retrained", retrained)):
        model.save_pretrained(tmp_path / name)
    made_for.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    adapter = random_adapter(made_for)
    check_base_files(str(tmp_path / "made_for"), adapter)
    check_base_files(str(tmp_path / "sharded"), adapter)
    packed = {name: (9 * value).to(torch.float8_e4m3fn) for name, value in made_for.state_dict().items()}
    save_file(packed, tmp_path / "sharded" / "model.safetensors")  # its scales are elsewhere: nothing to compare
    (tmp_path / "sharded" / "model.safetensors.index.json").unlink()
    check_base_files(str(tmp_path / "sharded"), random_adapter(made_for, seed=1))
    for name, says in (("other_shape", "shape differs"), ("retrained", "singular vectors of")):
        with pytest.raises(BaseModelMismatchError, match=says):
            check_base_files(str(tmp_path / name), adapter)
