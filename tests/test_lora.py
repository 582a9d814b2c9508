"""Export: a LoRA that stock PEFT loads, and merged weights."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import SHIPPED, logits_of, random_adapter, tiny_model

import ipissa
from ipissa.adapter.frame import images
from ipissa.adapter.layer import dense_weight
from ipissa.errors import AlphaError, ConfigError

IDS = torch.tensor([[5, 9, 33, 71, 12, 40]])


def assert_peft_equals_runtime(model: Any, adapter: Any, alpha: float, folder: Path, ids: torch.Tensor) -> None:
    steered = ipissa.attach(model, adapter)
    with steered.alpha(alpha):
        expected = logits_of(model, ids)
    steered.detach()
    ipissa.to_lora(adapter, alpha=alpha, output_dir=folder)
    loaded = peft.PeftModel.from_pretrained(model, folder)
    found = logits_of(loaded, ids)
    loaded.unload()
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("rank", [6, 40])  # 40 is beyond some modules' own rank
def test_exported_lora_in_stock_peft_equals_the_runtime(model: Any, tmp_path: Path, rank: int) -> None:
    adapter = random_adapter(model, rank=min(rank, 16), rotate_u=True)
    assert_peft_equals_runtime(model, adapter, 0.75, tmp_path / "lora", IDS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("alpha", [-1.3, 0.6])
def test_shipped_adapters_export_to_stock_peft(demo: tuple[Any, Any], tmp_path: Path, path: Path, alpha: float) -> None:
    model, tokenizer = demo
    ids = tokenizer("I found a wallet. My choice:", return_tensors="pt").input_ids
    assert_peft_equals_runtime(model, ipissa.load_adapter(path), alpha, tmp_path / "lora", ids)


def test_merged_weights_equal_the_runtime(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    adapter = random_adapter(model)
    steered = ipissa.attach(model, adapter)
    with steered.alpha(-0.6):
        expected = logits_of(model, IDS)
    steered.detach()
    ipissa.merge(model, adapter, alpha=-0.6)
    assert (logits_of(model, IDS) - expected).abs().max() <= 1e-4


PACKED = [torch.uint8, torch.float8_e4m3fn]  # as bitsandbytes and as FP8 checkpoints have them


class Packed(torch.nn.Linear):
    """Computes as it did, from a weight that is kept in another form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.dense, self.bias)


def pack(linear: Any, dtype: torch.dtype) -> None:
    linear.__class__, linear.dense = Packed, linear.weight.detach().clone()
    linear.weight = torch.nn.Parameter((100 * linear.dense).to(dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_nothing_is_merged_into_weights_that_are_packed(llama: Any, dtype: torch.dtype) -> None:
    adapter = random_adapter(llama)
    pack(llama.get_submodule(list(adapter.modules)[-1]), dtype)
    before = [value.clone() for value in llama.parameters()]
    with pytest.raises(ConfigError, match=rf"holds {dtype}, which nothing can be added to; load the model in float32"):
        ipissa.merge(llama, adapter, alpha=1.0)
    assert all(torch.equal(one, other) for one, other in zip(before, llama.parameters(), strict=True))


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_weights_that_are_packed_are_steered_by_what_they_do(llama: Any, dtype: torch.dtype) -> None:
    adapter = random_adapter(llama)
    steered = ipissa.attach(llama, adapter)
    with steered.alpha(0.7):
        expected = logits_of(llama, IDS)
    steered.detach()
    weight = llama.model.layers[1].mlp.down_proj.weight.detach().clone()
    for name in adapter.modules:
        pack(llama.get_submodule(name), dtype)
    with ipissa.attach(llama, adapter).alpha(0.7):
        assert (logits_of(llama, IDS) - expected).abs().max() <= 1e-4
    packed = llama.model.layers[1].mlp.down_proj
    assert torch.allclose(dense_weight(packed), weight, atol=1e-5)
    assert torch.allclose(images(packed, packed.weight, torch.eye(48)), weight, atol=1e-5)


def test_nothing_is_merged_into_a_weight_that_another_module_reads() -> None:
    tied = tiny_model("gemma3")  # whose output embeddings are its input embeddings
    before = [value.clone() for value in tied.parameters()]
    with pytest.raises(ConfigError, match=r"lm_head is that of model.embed_tokens too.* export it as a LoRA"):
        ipissa.merge(tied, random_adapter(tied, suffixes=("down_proj", "lm_head")), alpha=1.0)
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):  # PEFT's, which merges all the same
        wrapped = peft.get_peft_model(tied, ipissa.InnerPissaConfig(r=4, target_modules=["lm_head"]))
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(ConfigError, match=r"lm_head is that of model.embed_tokens too"):
            merge()
    assert all(torch.equal(one, other) for one, other in zip(before, wrapped.unload().parameters(), strict=True))


def test_export_refuses_a_full_folder_and_a_non_finite_alpha(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not an empty folder"):
        ipissa.to_lora(random_adapter(llama), alpha=1.0, output_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    for bad, says in ((float("nan"), "nan"), (10**400, "1000"), (None, "None")):
        with pytest.raises(AlphaError, match=f"alpha {says}.* is not a finite number"):
            ipissa.to_lora(random_adapter(llama), alpha=bad, output_dir=tmp_path / "new")
