"""Real servers on the demo model: stock `vllm serve` with the plugin, and `ipissa-serve --engine vllm`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import SHIPPED
from serving import Served, free_port

import ipissa

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` runs these"
)
START_SECONDS = 600  # of a machine that is busy with other things
BIN = Path(sys.executable).parent
MODEL = "smollm2-135m"
ADAPTERS = ",".join(map(str, SHIPPED))


def lora_bytes() -> int:
    """What the largest LoRA of one of the shipped adapters weighs."""
    adapters = map(ipissa.load_adapter, SHIPPED)
    return max(sum(f.U.nbytes + f.V.nbytes for f in adapter.modules.values()) for adapter in adapters)


class VllmServed(Served):
    """A running server, its process and where it keeps its LoRAs."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], loras: Path) -> None:
        super().__init__(url)
        self.http.timeout = httpx.Timeout(600)
        self.process, self._loras = process, loras

    def stored(self) -> int:
        """LoRAs on disk."""
        return len(list(self._loras.glob("*/*/adapter_model.safetensors")))

    def memory(self) -> int:
        """Bytes that the server's processes have to themselves."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(each.memory_full_info().uss for each in family)

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric's series."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


@contextmanager
def running(folder: Path, command: list[str], **environment: str) -> Iterator[VllmServed]:
    """A server from start to end; its log is `folder/log`."""
    port = free_port()
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "IPISSA_LORA_DIR": str(folder / "loras"),
        **environment,
    }
    with (folder / "log").open("wb") as log:
        arguments = [str(BIN / command[0]), *command[1:], "--port", str(port)]
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env={**os.environ, **settings}, cwd=folder)
        served = VllmServed(f"http://127.0.0.1:{port}", process, folder / "loras")
        try:
            _wait(served, folder / "log")
            yield served
        finally:
            served.close()
            process.terminate()
            process.wait(timeout=120)


def _wait(served: VllmServed, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if served.process.poll() is not None:
            raise RuntimeError(f"The server ended at once:\n{log.read_text(errors='replace')[-6000:]}")
        try:
            if served.http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"{served.url} did not become ready in {START_SECONDS} s.")


def stock(folder: Path, model: str, *options: str, **environment: str) -> tuple[Path, list[str], dict[str, str]]:
    """Arguments of `running` for `vllm serve` with the plugin and the shipped adapters."""
    command = ["vllm", "serve", model, "--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "16", "--enable-lora", "--max-lora-rank", "32"]
    names = {"IPISSA_ADAPTERS": ADAPTERS, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    return folder, [*command, *options], {**names, **environment}


def ours(folder: Path, *options: str, **environment: str) -> tuple[Path, list[str], dict[str, str]]:
    """Arguments of `running` for `ipissa-serve --engine vllm` with the shipped adapters."""
    command = ["ipissa-serve", "--engine", "vllm", "--no-ui", "--max-model-len", "1024", "--max-batch", "16"]
    return folder, [*command, *options], environment
