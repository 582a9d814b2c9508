"""Other ways to answer 16 requests, each at its own α, with the same model in this process.

All return seconds per token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

import ipissa
from ipissa.adapter import Adapter
from ipissa.adapter.delta import delta_core

from .timing import seconds


def generate(model: Any, prompt: list[int], rows: int, tokens: int, **options: Any) -> float:
    """`transformers.generate` on one static batch."""
    ids = torch.tensor([[1000 + i, *prompt] for i in range(rows)], device=model.device)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    return seconds(lambda: model.generate(input_ids=ids, attention_mask=mask, **settings, **options)) / (rows * tokens)


@contextmanager
def lora_rows(model: Any, adapter: Adapter, alphas: Sequence[float]) -> Iterator[tuple[Any, list[str]]]:
    """Stock PEFT with one LoRA per α, chosen per row by `adapter_names`: yields (model, names)."""
    names = [f"alpha{i}" for i in range(len(alphas))]
    with tempfile.TemporaryDirectory() as folder:
        for name, alpha in zip(names, alphas, strict=True):
            ipissa.to_lora(adapter, alpha=alpha, output_dir=Path(folder) / name)
        lora = peft.PeftModel.from_pretrained(model, Path(folder) / names[0], adapter_name=names[0])
        for name in names[1:]:
            lora.load_adapter(Path(folder) / name, adapter_name=name)
    lora.eval()
    try:
        yield lora, names
    finally:
        lora.unload()


class PublishedMethod:
    """One α for the whole model, and a linear solve per adapted layer and forward pass, as in the papers.

    Requests of different α cannot share a batch, so they take turns.
    """

    def __init__(self, model: Any, adapter: Adapter) -> None:
        self._model = model
        self._alpha = torch.zeros(1)
        self._handles = [
            model.get_submodule(name).register_forward_hook(self._hook(adapter, name)) for name in adapter.modules
        ]

    def seconds_per_token(self, prompt: list[int], alphas: Sequence[float], tokens: int) -> float:
        """All requests, one after the other."""
        total = 0.0
        for alpha in alphas:
            self._alpha = torch.tensor([alpha])
            total += generate(self._model, prompt, 1, tokens)
        return total / len(alphas)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, adapter: Adapter, name: str) -> Any:
        factors, config = adapter.modules[name], adapter.config
        dtype = self._model.dtype
        u, v = factors.U.to(dtype), factors.V.to(dtype)

        def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            core = delta_core(
                factors.S,
                factors.rotation_v,
                factors.rotation_u,
                factors.delta_s,
                self._alpha,
                rotation=config.rotation,
                scale_mode=config.scale_mode,
            )[0]
            return output + args[0] @ v @ core.to(dtype) @ u.mT

        return add


class RepengMethod:
    """repeng's control vectors: one strength for the whole model, so requests of different α take turns."""

    def __init__(self, model: Any) -> None:
        from repeng import ControlModel, ControlVector

        layers = list(range(6, 27))
        rng = np.random.default_rng(0)
        size = model.config.hidden_size
        directions = {layer: rng.standard_normal(size).astype(np.float32) / size**0.5 for layer in layers}
        self._vector = ControlVector(model_type=model.config.model_type, directions=directions)
        self._model = ControlModel(model, layers)

    def seconds_per_token(self, prompt: list[int], alphas: Sequence[float], tokens: int) -> float:
        """All requests, one after the other."""
        total = 0.0
        for alpha in alphas:
            self._model.set_control(self._vector, alpha)
            total += generate(self._model, prompt, 1, tokens)
            self._model.reset()
        return total / len(alphas)

    def close(self) -> None:
        """Unwrap the model."""
        self._model.unwrap()
