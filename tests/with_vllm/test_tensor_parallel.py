"""Three workers on the CPU, each with a third of every layer, say what one says; also on layers that vLLM packs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SHIPPED, random_adapter
from servers import MODEL, VllmServed, needs_vllm, ours, running
from serving import Served, complete, in_thread, texts

from ipissa.adapter import save_adapter

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def adapters(demo: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped adapters, and one of a smaller rank on some of the layers that vLLM packs into one."""
    packed = tmp_path_factory.mktemp("packed") / "packed.safetensors"
    save_adapter(random_adapter(demo[0], suffixes=("q_proj", "v_proj", "gate_proj"), rank=8), packed)
    return {"packed": packed, **{path.stem: path for path in SHIPPED}}


@pytest.fixture(scope="module")
def served(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServed]:
    """SmolLM2's 9 query and 3 key heads divide by 3, not by 2."""
    options = ["--model", MODEL, "--dtype", "float32", "--tensor-parallel-size", "3", "--max-cache-tokens", "8192"]
    for name, path in adapters.items():
        options += ["--adapter", f"{name}={path}"]
    folder, command, settings = ours(tmp_path_factory.mktemp("three"), *options)
    with running(folder, command, **(settings | {"VLLM_CPU_OMP_THREADS_BIND": "0|1|0"})) as server:
        yield server


@pytest.fixture(scope="module")
def torch_served(adapters: dict[str, Path]) -> Iterator[Served]:
    """The same on the torch engine."""
    with in_thread(adapters=adapters, ui=False, device="cpu", dtype="float32", alpha_bucket=0.05) as server:
        server.http.timeout = 600
        yield server


@pytest.mark.parametrize(
    "steers",
    [
        [{"kind": -3}, {"kind": 0}, {"kind": 2.5}, {"honest": 2, "kind": -2}],
        [{"packed": 0.25}, {"packed": -0.25}, {"packed": 0.25, "kind": 1.5}],
    ],
    ids=["shipped", "packed"],
)
def test_tensor_parallel_workers_give_the_same_greedy_text(
    served: VllmServed, torch_served: Served, steers: list[dict[str, float]]
) -> None:
    body = {"prompt": "When I met my neighbour this morning, I", "steer_alpha": steers, "logprobs": 1}
    here, there = complete(served, **body), complete(torch_served, **body)
    assert texts(here) == texts(there)
    assert len(set(texts(there))) >= 3  # or this would prove little
    for a, b in zip(here["choices"], there["choices"], strict=True):
        assert a["logprobs"]["token_logprobs"][0] == pytest.approx(b["logprobs"]["token_logprobs"][0], abs=0.02)
