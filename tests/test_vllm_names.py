"""What the vLLM plugin reads from model names and from the environment; no vLLM needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import random_adapter

from ipissa.adapter import save_adapter
from ipissa.errors import AdapterFileError, AlphaError, ConfigError
from ipissa.vllm.dials import Dials
from ipissa.vllm.names import SettingNames

NAMES = SettingNames(("honest", "kind"), bucket=0.05, limit=2)


@pytest.mark.parametrize(
    ("name", "steer", "written"),
    [
        ("honest@0.75", {"honest": 0.75}, "honest@0.75"),
        ("honest@0.7512", {"honest": 0.75}, "honest@0.75"),
        ("honest@-2", {"honest": -2.0}, "honest@-2"),
        ("honest@1e0", {"honest": 1.0}, "honest@1"),
        ("kind@-0.2+honest@0.7", {"honest": 0.7, "kind": -0.2}, "honest@0.7+kind@-0.2"),
        ("honest@0.01+kind@1", {"honest": 0.0, "kind": 1.0}, "kind@1"),
        ("honest@-0.01", {"honest": 0.0}, ""),
    ],
)
def test_a_name_is_a_setting_and_has_one_spelling(name: str, steer: dict[str, float], written: str) -> None:
    assert NAMES.is_setting(name)
    assert NAMES.read(name) == steer
    assert NAMES.write(steer) == written


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("honest", "no α that is a number"),
        ("honest@", "no α that is a number"),
        ("honest@big", "no α that is a number"),
        ("honest@nan", "out of range"),
        ("honest@-inf", "out of range"),
        ("honest@2.001", "from -2 to 2"),
        ("honest@1e999", "out of range"),
        ("honest@1+cruel@1", "names the adapter 'cruel'; there are honest, kind"),
        ("honest@1+honest@1", "twice"),
        ("honest@1+", "names the adapter ''"),
    ],
)
def test_what_is_no_setting_is_refused_in_one_sentence(name: str, says: str) -> None:
    with pytest.raises(AlphaError, match=says):
        NAMES.read(name)


def test_exact_alphas_have_different_names() -> None:
    exact = SettingNames(("honest",), bucket=0, limit=10)
    near = [{"honest": 0.1234567}, {"honest": 0.12345671}]
    assert len({exact.write(steer) for steer in near}) == 2
    assert [exact.read(exact.write(steer)) for steer in near] == near


def test_names_that_could_not_be_told_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match="holds @ or"):
        SettingNames(("a@1",), bucket=0.05, limit=1)


@pytest.fixture
def environment(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that names two adapters."""
    for seed, name in enumerate(("honest", "kind")):
        save_adapter(random_adapter(llama, seed=seed), tmp_path / f"{name}.safetensors")
    monkeypatch.setenv("IPISSA_ADAPTERS", f"honest={tmp_path}/honest.safetensors, {tmp_path}/kind.safetensors")
    monkeypatch.setenv("IPISSA_LORA_DIR", str(tmp_path / "memory"))
    return monkeypatch


def test_the_dials_of_the_environment_bake_one_lora_per_bucket(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("IPISSA_ALPHA_BUCKET", "0.1")
    dials = Dials.from_environment()
    assert dials is not None
    found = {dials.resolve(name) for name in ("honest@0.31", "honest@0.3", "honest@0.29+kind@0.04")}
    assert len(found) == 1
    name, lora = found.pop()
    assert name == "honest@0.3"
    with dials.baked_again(name) as folder:
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (folder / file).read_bytes() == (lora.path / file).read_bytes()
    assert not folder.exists()


def test_a_name_at_zero_is_the_base(environment: pytest.MonkeyPatch) -> None:
    dials = Dials.from_environment()
    assert dials is not None
    assert dials.is_base("honest@0.01+kind@0")
    assert not any(dials.is_base(name) for name in ("honest@0.05", "honest", "other@0", "smollm2"))


def test_a_composition_beyond_the_engines_rank_is_refused(environment: pytest.MonkeyPatch) -> None:
    dials = Dials.from_environment()
    assert dials is not None
    dials.max_rank = 4
    with pytest.raises(AlphaError, match="LoRA of rank 6, and this server takes 4"):
        dials.resolve("honest@1")


def test_an_unusable_environment_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("IPISSA_MAX_ALPHA", "much")
    with pytest.raises(ConfigError, match="IPISSA_MAX_ALPHA=much is not a number"):
        Dials.from_environment()
    environment.setenv("IPISSA_MAX_ALPHA", "3")
    environment.setenv("IPISSA_ADAPTERS", "honest=nowhere.safetensors")
    dials = Dials.from_environment()
    assert dials is not None
    with pytest.raises(AdapterFileError, match="does not exist"):
        dials.resolve("honest@1")
    environment.delenv("IPISSA_ADAPTERS")
    assert Dials.from_environment() is None


def test_no_rounding_leaves_the_range_that_is_promised() -> None:
    names = SettingNames(("honest",), bucket=0.3, limit=0.5)
    assert names.read("honest@0.5") == {"honest": 0.3}
    assert names.read("honest@-0.46") == {"honest": -0.3}
