"""Three workers on the CPU, each with a third of every layer, say what one says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import SHIPPED
from servers import VllmServed, needs_vllm, ours, running
from serving import complete, in_thread, texts

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServed]:
    """SmolLM2's 9 query and 3 key heads divide by 3, not by 2."""
    options = ("--dtype", "float32", "--tensor-parallel-size", "3", "--max-cache-tokens", "8192")
    folder, command, settings = ours(tmp_path_factory.mktemp("three"), *options)
    with running(folder, command, **(settings | {"VLLM_CPU_OMP_THREADS_BIND": "0|1|0"})) as server:
        yield server


def test_tensor_parallel_workers_give_the_same_greedy_text(served: VllmServed) -> None:
    with in_thread(
        adapters={path.stem: path for path in SHIPPED}, ui=False, device="cpu", dtype="float32", alpha_bucket=0.05
    ) as torch_served:
        torch_served.http.timeout = served.http.timeout
        body = {
            "prompt": "When I met my neighbour this morning, I",
            "steer_alpha": [{"kind": -1.5}, {"kind": 0}, {"kind": 1.5}, {"honest": 0.8, "kind": -0.9}],
        }
        assert texts(complete(served, **body)) == texts(complete(torch_served, **body))
