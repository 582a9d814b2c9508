"""Any α of an adapter as a standard LoRA, or merged into the weights.

ΔW(α) = U [R_u(α) diag(S(α)) R_v(α)ᵀ - diag(S)] Vᵀ has rank at most r and a right factor that does not
depend on α, so `lora_A = Vᵀ` and `lora_B(α) = U [R_u(α) diag(S(α)) R_v(α)ᵀ - diag(S)]` with scaling 1.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ipissa.adapter.base_model import check_base, find_linear
from ipissa.adapter.checkpoint import Adapter, AnyAdapter, ModuleFactors
from ipissa.adapter.config import one_of
from ipissa.adapter.delta import delta_core
from ipissa.adapter.stored import is_packed
from ipissa.buckets import MAX_ALPHA
from ipissa.errors import AlphaError, ConfigError
from ipissa.models import DTYPES

TENSOR_NAME = "base_model.model.{module}.{part}.weight"


def lora_factors(adapter: Adapter, module: str, alpha: float) -> tuple[Tensor, Tensor]:
    """(lora_A (r, d_in), lora_B (d_out, r)) of one module at α, computed in float64."""
    factors = _double(adapter.modules[module])
    core = delta_core(
        factors.S,
        factors.rotation_v,
        factors.rotation_u,
        factors.delta_s,
        torch.tensor([_finite(alpha)], dtype=torch.float64),
        rotation=adapter.config.rotation,
        scale_mode=adapter.config.scale_mode,
    )[0]
    return factors.V.mT.contiguous(), factors.U @ core.mT


def to_lora(adapter: AnyAdapter, *, alpha: float, output_dir: str | os.PathLike[str], dtype: str = "float32") -> Path:
    """Write the adapter at one α as a PEFT LoRA folder that any LoRA-serving engine loads.

    Raises:
        AlphaError: α is not finite.
        ConfigError: `output_dir` already holds something else, `dtype` is unknown, or the adapter is a vector.
    """
    one_of(dtype, DTYPES, name="dtype")
    adapter = turning(adapter)
    tensors: dict[str, Tensor] = {}
    for module in adapter.modules:
        a, b = lora_factors(adapter, module, alpha)
        for part, value in (("lora_A", a), ("lora_B", b)):
            tensors[TENSOR_NAME.format(module=module, part=part)] = value.to(DTYPES[dtype]).contiguous()
    ranks = {module: factors.S.numel() for module, factors in adapter.modules.items()}
    with new_folder(output_dir) as folder:
        write_lora(folder, tensors, ranks, base=adapter.base_model.get("name"))
    return Path(output_dir)


def write_lora(folder: Path, tensors: dict[str, Tensor], ranks: dict[str, int], *, base: str | None) -> None:
    """Fill `folder` with a LoRA as PEFT writes it; `tensors` by PEFT's names, `ranks` by module."""
    rank = max(ranks.values())
    smaller = {module: r for module, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        # Several engines reinterpret or refuse "pissa" here; the exported factors are a plain LoRA.
        "init_lora_weights": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(ranks),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: AnyAdapter, *, alpha: float) -> PreTrainedModel:
    """Replace every adapted weight of `model` by W + ΔW(α), in place; returns the model.

    Raises:
        ConfigError: the adapter is a vector, or a weight is packed, or another module's too, as tied embeddings are.
    """
    adapter = turning(adapter)
    check_base(model, adapter)
    _finite(alpha)
    layers = {name: find_linear(model, name, adapter) for name in adapter.modules}  # all, before any is changed
    check_mergeable(model, layers)
    for name, layer in layers.items():
        weight = layer.weight
        a, b = lora_factors(adapter, name, alpha)
        weight.copy_((weight.double() + (b @ a).to(weight.device)).to(weight.dtype))
    return model


def check_mergeable(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Raise `ConfigError` unless each of these layers has numbers to add to, which no other module reads."""
    for name, layer in layers.items():
        if is_packed(layer.weight):
            raise ConfigError(
                f"{name} holds {layer.weight.dtype}, which nothing can be added to; load the model in float32, "
                "bfloat16 or float16 to merge."
            )
        for other, module in model.named_modules():
            if module is not layer and any(weight is layer.weight for weight in module._parameters.values()):
                raise ConfigError(
                    f"The weight of {name} is that of {other} too, which merging would change as well; attach the "
                    "adapter or export it as a LoRA instead."
                )


def turning(adapter: AnyAdapter, name: str | None = None) -> Adapter:
    """The adapter, if it changes weights.

    Raises:
        ConfigError: it is a vector, which adds to a module's output whatever its input.
    """
    if not isinstance(adapter, Adapter):
        raise ConfigError(
            f"The adapter {name or adapter.name!r} is of kind {adapter.kind!r}, which no LoRA can do; serve it with "
            "--engine torch."
        )
    return adapter


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, which appears at `path` whole or not at all; files that are there already are safe."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; choose another output.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        work = Path(temporary) / "new"
        work.mkdir()
        yield work
        if folder.exists():
            folder.rmdir()
        work.rename(folder)


def _finite(alpha: float) -> float:
    try:
        value = float(alpha)
    except (TypeError, OverflowError):
        raise AlphaError(f"alpha {str(alpha)[:20]} is not a finite number.") from None
    if not math.isfinite(value):
        raise AlphaError(f"alpha {alpha} is not a finite number.")
    if not abs(value) < MAX_ALPHA:
        raise AlphaError(f"alpha {value:g} is beyond ±{MAX_ALPHA:.0e}; nothing finite is left of a model there.")
    return value


def _double(factors: ModuleFactors) -> ModuleFactors:
    return ModuleFactors(**{name: value.double() for name, value in factors.tensors().items()})
