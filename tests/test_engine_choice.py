"""What serves, before anything is loaded, and what it takes that may not be installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from ipissa_server.app import create_app, load_vllm
from ipissa_server.settings import Settings

from ipissa.errors import ConfigError


def test_every_engine_has_its_bucket_unless_one_is_given() -> None:
    assert [Settings(engine=engine).bucket for engine in ("torch", "vllm")] == [0.001, 0.05]
    assert Settings(engine="vllm", alpha_bucket=0).bucket == 0


def test_options_for_vllm_are_refused_by_the_torch_engine() -> None:
    with pytest.raises(ConfigError, match="max_loras is for vLLM"):
        Settings(vllm={"max_loras": 4})


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_the_vllm_engine_says_how_to_install_vllm(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="docs/scaling"):
        load_vllm(Settings(model=str(tiny / "model"), engine="vllm"), {})


@pytest.mark.parametrize("missing", ["gradio", "openai"])
def test_a_page_whose_packages_are_missing_says_how_to_install_them(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "ipissa_ui"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf'The page needs {missing}: run `pip install "ipissa\[ui\]"`'):
        create_app(Settings(ui=True))
    assert create_app(Settings(ui=False)).title == "ipissa"
