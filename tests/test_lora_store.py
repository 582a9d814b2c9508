"""LoRAs baked per setting of the dials: exact, shared, bounded, and gone when nobody needs them."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import peft
import pytest
import torch
from conftest import SHIPPED, TRAIT, logits_of, random_adapter
from safetensors.torch import load_file
from torch import Tensor

import ipissa
from ipissa.adapter import Adapter, VectorAdapter, save_adapter
from ipissa.adapter.baking import Baker
from ipissa.adapter.base_model import describe_base
from ipissa.adapter.lora import TENSOR_NAME
from ipissa.adapter.lora_store import LoraStore
from ipissa.errors import AlphaError, ConfigError

IDS = torch.tensor([[5, 9, 33, 71, 12, 40]])
VARIANTS = [
    {"rotation": rotation, "scale_mode": mode, "rotate_u": both}
    for rotation in ("cayley", "matrix_exp")
    for mode in ("add2", "add_tanh", "mult", "none")
    for both in (False, True)
]


def product(tensors: dict[str, Tensor], module: str) -> np.ndarray:
    """lora_B lora_A of one module, in float64."""
    a, b = (tensors[TENSOR_NAME.format(module=module, part=part)].double() for part in ("lora_A", "lora_B"))
    return (b @ a).numpy()


def baked(adapters: dict[str, Adapter], steer: dict[str, float], folder: Path) -> dict[str, Tensor]:
    """The tensors of a freshly baked LoRA."""
    folder.mkdir()
    Baker(adapters).bake(steer, folder)
    return load_file(folder / "adapter_model.safetensors")


def deltas(adapters: dict[str, Adapter], steer: dict[str, float]) -> dict[str, Any]:
    """Σ ΔW(α) per module, by the definition."""
    total: dict[str, Any] = {}
    for name, alpha in steer.items():
        for module, factors in adapters[name].modules.items():
            total[module] = total.get(module, 0) + oracle.delta_weight(factors, adapters[name].config, alpha)
    return total


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
@pytest.mark.parametrize("alpha", [-1.7, 0.001, 0.75])
def test_a_baked_lora_is_the_delta_of_the_definition(
    llama: Any, tmp_path: Path, variant: dict[str, Any], alpha: float
) -> None:
    adapters = {"honest": random_adapter(llama, **variant)}
    tensors = baked(adapters, {"honest": alpha}, tmp_path / "lora")
    for module, expected in deltas(adapters, {"honest": alpha}).items():
        assert np.abs(product(tensors, module) - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_adapter_bakes_to_what_it_exports_to(tmp_path: Path, path: Path) -> None:
    adapter = ipissa.load_adapter(path)
    tensors = baked({"it": adapter}, {"it": 0.75}, tmp_path / "baked")
    exported = load_file(ipissa.to_lora(adapter, alpha=0.75, output_dir=tmp_path / "x") / "adapter_model.safetensors")
    assert tensors.keys() == exported.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, exported[name], rtol=1e-4, atol=1e-5)


def test_a_composition_is_one_lora_of_the_summed_rank(llama: Any, tmp_path: Path) -> None:
    other = random_adapter(llama, seed=1, rank=4, suffixes=("v_proj", "gate_proj"))
    # Adapters usually differ in what they select; these would otherwise share their leading triples.
    modules = {name: replace(factors, V=factors.V.roll(1, 0)) for name, factors in other.modules.items()}
    adapters = {"honest": random_adapter(llama), "kind": replace(other, modules=modules)}
    steer = {"honest": 0.7, "kind": -0.2}
    tensors = baked(adapters, steer, tmp_path / "lora")
    for module, expected in deltas(adapters, steer).items():
        assert np.abs(product(tensors, module) - expected).max() <= 2e-6 * np.abs(expected).max()
    ranks = {name: tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    assert {rank for name, rank in ranks.items() if "v_proj" in name} == {10}
    assert {rank for name, rank in ranks.items() if "gate_proj" in name} == {4}
    assert Baker(adapters).rank() == 10
    assert Baker(adapters).rank(["kind"]) == 4


def test_adapters_with_the_same_right_factor_share_their_rank(llama: Any, tmp_path: Path) -> None:
    adapters = {"honest": random_adapter(llama, seed=0), "kind": random_adapter(llama, seed=1)}
    steer = {"honest": 0.7, "kind": -0.2}
    tensors = baked(adapters, steer, tmp_path / "lora")
    for module, expected in deltas(adapters, steer).items():
        assert tensors[TENSOR_NAME.format(module=module, part="lora_A")].shape[0] == 6
        assert np.abs(product(tensors, module) - expected).max() <= 2e-6 * np.abs(expected).max()


def test_a_right_factor_inside_another_but_for_rounding_shares_its_rank(llama: Any, tmp_path: Path) -> None:
    """Factorised elsewhere: signs and last digits differ; and with fewer triples."""
    other = random_adapter(llama, seed=1, rank=4)
    noise = torch.Generator().manual_seed(2)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    modules = {
        name: replace(f, U=f.U * signs, V=f.V * signs + 1e-5 * torch.randn(f.V.shape, generator=noise))
        for name, f in other.modules.items()
    }
    adapters = {"kind": replace(other, modules=modules), "honest": random_adapter(llama, seed=0)}
    steer = {"honest": 0.7, "kind": -0.2}
    tensors = baked(adapters, steer, tmp_path / "lora")
    assert Baker(adapters).rank() == 6
    for module, expected in deltas(adapters, steer).items():
        assert tensors[TENSOR_NAME.format(module=module, part="lora_A")].shape[0] == 6
        assert np.abs(product(tensors, module) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_adapters_that_share_only_with_one_that_is_not_turned_need_their_own_rank(llama: Any, tmp_path: Path) -> None:
    whole = random_adapter(llama, suffixes=("down_proj",), rank=16)

    def part(kept: slice) -> Adapter:
        modules = {
            name: replace(
                f,
                U=f.U[:, kept],
                S=f.S[kept],
                V=f.V[:, kept],
                rotation_v=f.rotation_v[kept, kept],
                delta_s=f.delta_s[kept],
            )
            for name, f in whole.modules.items()
        }
        return replace(whole, config=replace(whole.config, rank=10), modules=modules)

    adapters = {"a": whole, "b": part(slice(10)), "c": part(slice(6, 16))}
    baker = Baker(adapters)
    assert [baker.rank(names) for names in (["a", "b", "c"], ["b", "c"], ["a", "c"], ["b"])] == [16, 20, 16, 10]
    assert baker.rank() == 20
    tensors = baked(adapters, {"b": 0.7, "c": -0.2}, tmp_path / "lora")
    assert max(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name) == baker.rank()


def test_what_shipped_adapters_learnt_adds_up_and_their_leading_triples_are_shared() -> None:
    adapters = {path.stem: ipissa.load_adapter(path) for path in SHIPPED}
    learnt = [a.config.rank for a in adapters.values() if a.config.directions == "learnt"]
    leading = [a.config.rank for a in adapters.values() if a.config.directions == "triples"]
    assert Baker(adapters).rank() == sum(learnt) + max(leading, default=0)


def test_stock_peft_with_a_baked_composition_equals_the_runtime(llama: Any, tmp_path: Path) -> None:
    adapters = {"honest": random_adapter(llama), "kind": random_adapter(llama, seed=1, rank=4, rotate_u=True)}
    steer = {"honest": 0.7, "kind": -0.2}
    steered = ipissa.attach(llama, adapters)
    with steered.alpha(steer):
        expected = logits_of(llama, IDS)
    steered.detach()
    baked(adapters, steer, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(llama, tmp_path / "lora")
    assert (logits_of(loaded, IDS) - expected).abs().max() <= 1e-4


@pytest.fixture
def baker(llama: Any, tmp_path: Path) -> Baker:
    """Two adapters read from files."""
    names = ("honest", "kind")
    saved = [save_adapter(random_adapter(llama, seed=i), tmp_path / f"{name}.st") for i, name in enumerate(names)]
    return Baker(dict(zip(names, saved, strict=True)))


def test_the_store_keeps_the_latest_and_counts_what_it_found(baker: Baker, tmp_path: Path) -> None:
    store = LoraStore(baker, capacity=3, parent=tmp_path / "memory")
    first = store.get({"honest": 0.1})
    for alpha in (0.2, 0.1, 0.3, 0.4):  # 0.1 is used again, so 0.2 is the one to go
        store.get({"honest": alpha})
    assert store.get({"honest": 0.1}) == first
    assert first.path.is_dir()
    assert len(store) == 3
    assert (store.info()["honest"].hits, store.info()["honest"].misses) == (2, 4)
    assert store.info()["kind"].currsize == 0
    assert store.touch(first.key)
    store.get({"honest": 0.5})
    store.get({"honest": 0.6})
    assert store.touch(first.key)  # it was, before these two, so 0.3 and 0.4 had to go
    assert not store.touch("nothing")


def test_five_hundred_settings_leave_the_folder_bounded(baker: Baker, tmp_path: Path) -> None:
    store = LoraStore(baker, capacity=8, parent=tmp_path / "memory")
    seen = {store.get({"honest": i / 100, "kind": -i / 100}).number for i in range(1, 501)}
    assert len(seen) == 500
    assert len(store) == len([path for path in store.folder.iterdir() if path.is_dir()]) == 8


def test_a_leased_lora_outlives_any_number_of_others(baker: Baker, tmp_path: Path) -> None:
    store = LoraStore(baker, capacity=1, parent=tmp_path / "memory")
    with store.lease({"honest": 0.5}) as lora:
        for i in range(1, 6):
            store.get({"kind": i / 10})
        assert (lora.path / "adapter_model.safetensors").is_file()
    store.get({"kind": 0.9})
    assert not lora.path.exists()
    assert len(store) == 1


def test_numbers_follow_from_the_file_and_the_alpha_alone(baker: Baker, tmp_path: Path) -> None:
    here, there = (LoraStore(baker, parent=tmp_path / name) for name in ("a", "b"))
    there.get({"kind": 1.0})
    renamed = LoraStore(Baker({"other": baker.adapters["honest"]}), parent=tmp_path / "c")
    number = here.get({"honest": 0.75, "kind": 0.0}).number
    assert number == there.get({"honest": 0.75}).number == renamed.get({"other": 0.75}).number
    assert number != here.get({"kind": 0.75}).number
    assert 2**62 <= number < 2**63  # vLLM keeps it in an int64, and counts its own from 1


def test_settings_asked_for_at_once_are_made_once(baker: Baker, tmp_path: Path) -> None:
    store = LoraStore(baker, parent=tmp_path / "memory")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: store.get({"honest": 0.1 * (1 + i % 2)}), range(16)))
    assert len(set(found)) == 2
    assert store.info()["honest"].misses == 2


def test_zero_and_unsaved_adapters_are_refused(baker: Baker, tmp_path: Path) -> None:
    store = LoraStore(baker, parent=tmp_path / "memory")
    with pytest.raises(AlphaError, match="base model"):
        store.get({"honest": 0.0})
    unsaved = LoraStore(Baker({"it": replace(baker.adapters["honest"], digest=None)}), parent=tmp_path / "memory")
    with pytest.raises(ConfigError, match="not read from a file"):
        unsaved.get({"it": 1.0})


def test_what_a_killed_process_left_is_swept_away_and_what_lives_is_not(baker: Baker, tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from ipissa.adapter.lora_store import LoraStore; "
        "store = LoraStore(None, parent=Path(sys.argv[1])); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "memory")], check=False, timeout=120)
    left = list((tmp_path / "memory").iterdir())
    assert len(left) == 1
    living = LoraStore(baker, parent=tmp_path / "memory")
    assert not left[0].exists()
    LoraStore(baker, parent=tmp_path / "memory").close()
    assert list((tmp_path / "memory").iterdir()) == [living.folder]


def test_a_vector_is_no_lora_and_is_refused(llama: Any, tmp_path: Path) -> None:
    vector = VectorAdapter(
        modules={"model.layers.1": torch.ones(32)}, base_model=describe_base(llama, "tiny"), trait=dict(TRAIT)
    )
    with pytest.raises(
        ConfigError, match="'push' is of kind 'vector', which no LoRA can do; serve it with --engine torch"
    ):
        Baker({"honest": random_adapter(llama), "push": vector})
    with pytest.raises(ConfigError, match="'honest' is of kind 'vector', which no LoRA can do"):
        ipissa.to_lora(vector, alpha=1.0, output_dir=tmp_path / "lora")
    with pytest.raises(ConfigError, match="'honest' is of kind 'vector', which no LoRA can do"):
        ipissa.merge(llama, vector, alpha=1.0)
