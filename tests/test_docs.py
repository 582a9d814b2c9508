"""Documents that name code must name code that exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, random_adapter, tiny_model

from ipissa.adapter import save_adapter
from ipissa.adapter.lora import lora_factors


def test_every_test_that_the_feature_rows_name_exists() -> None:
    written = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)", written))
    rows = (ROOT / "docs" / "feature-rows.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", rows))
    assert named
    assert named <= defined
    numbers = [int(n) for n in re.findall(r"^\| (\d+) \|", rows, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_file_that_the_architecture_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:ipissa|server|ui|tests|benchmarks|docs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_picture_that_the_documents_show_exists() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = [(path, link) for path in documents for link in re.findall(r"!\[.*?\]\((.*?)\)", path.read_text("utf-8"))]
    assert shown
    for path, link in shown:
        assert (path.parent / link).is_file(), f"{path.name} shows {link}"


@pytest.mark.parametrize("settings", [{}, {"scale_mode": "mult", "rotate_u": True, "rotation": "matrix_exp"}])
def test_the_file_format_is_enough_to_compute_an_adapter(settings: dict[str, Any], tmp_path: Path) -> None:
    text = (ROOT / "docs" / "file-format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    defined: dict[str, Any] = {}
    exec(code, defined)
    adapter = random_adapter(tiny_model("llama"), **settings)
    path = tmp_path / "adapter.safetensors"
    save_adapter(adapter, path)
    for module in adapter.modules:
        A, B = lora_factors(adapter, module, 0.7)
        assert (defined["weight_change"](path, module, 0.7) - B @ A).abs().max() < 1e-9
        assert defined["weight_change"](path, module, 0.0).abs().max() < 1e-12
