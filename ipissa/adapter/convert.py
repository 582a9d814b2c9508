"""Between the three forms of one adapter: a live PEFT model, a PEFT folder, and the one-file format.

A PEFT folder holds `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them, plus
`ipissa.json` with what PEFT has no place for: trait, base model, α range, evaluation.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from ipissa.adapter.checkpoint import Adapter, AdapterConfig, ModuleFactors, adapter_of, metadata_of, take
from ipissa.adapter.config import InnerPissaConfig
from ipissa.adapter.frame import frame_factors, frame_of
from ipissa.adapter.layer import InnerPissaLayer, dense_weight
from ipissa.adapter.lora import new_folder
from ipissa.errors import AdapterFileError, ConfigError
from ipissa.rotation import CLAMPS, skew

PREFIX = "base_model.model."
DESCRIPTION = "ipissa.json"


def from_peft_model(peft_model: nn.Module, *, adapter_name: str = "default", **description: Any) -> Adapter:
    """The adapter a PEFT-wrapped model holds now; `description` fills the other fields of `Adapter`.

    Raises:
        ConfigError: it holds none of that name.
    """
    modules: dict[str, ModuleFactors] = {}
    for full_name, layer in peft_model.named_modules():
        if isinstance(layer, InnerPissaLayer) and adapter_name in layer.innerpissa_config:
            config = layer.innerpissa_config[adapter_name]
            modules[full_name.removeprefix(PREFIX)] = _factors(layer, adapter_name)
    if not modules:
        raise ConfigError(f"The model holds no InnerPiSSA adapter {adapter_name!r}; name one that it was wrapped with.")
    return Adapter(config=_adapter_config(config, modules), modules=modules, **description)


def _factors(layer: InnerPissaLayer, adapter_name: str) -> ModuleFactors:
    if adapter_name in layer.innerpissa_frame:
        frame = frame_of(layer.innerpissa_frame[adapter_name].detach())
        weight = layer.original_weight() if layer.merged else dense_weight(layer.base_linear())
        found = frame_factors(weight, frame)
        return ModuleFactors(*(factor.float().cpu() for factor in found))
    parts = {
        "U": layer.innerpissa_U[adapter_name],
        "S": layer.innerpissa_S[adapter_name],
        "V": layer.innerpissa_V[adapter_name],
        "p_v": layer.innerpissa_p_v.get(adapter_name, None),
        "p_u": layer.innerpissa_p_u.get(adapter_name, None),
        "d": layer.innerpissa_d.get(adapter_name, None),
    }
    return _effective(layer.innerpissa_config[adapter_name], parts)


def from_peft_folder(folder: str | os.PathLike[str]) -> Adapter:
    """Read the PEFT form written by `to_peft_folder`, or by PEFT beside an `ipissa.json`, as strictly as a file.

    Raises:
        AdapterFileError: it is not one, or a tensor is missing, unexpected, misshapen or not finite.
    """
    folder = Path(folder)
    try:
        config = InnerPissaConfig.from_pretrained(str(folder))
        if config.directions == "learnt":
            raise AdapterFileError(
                f"{folder} holds learnt directions, which are an adapter only together with the base model's weights; "
                "load it with PEFT and pass the model to from_peft_model."
            )
        tensors = load((folder / "adapter_model.safetensors").read_bytes())  # kept apart from the file
        description = json.loads((folder / DESCRIPTION).read_text())
        if lacks := {"base_model", "trait", "alpha_range"} - description.keys():
            raise AdapterFileError(
                f"{folder / DESCRIPTION} lacks {sorted(lacks)}; every adapter says so much of itself."
            )
        found = _take_modules(folder, config, tensors)
        adapter_config = _adapter_config(config, found, description.pop("directions", None))
        adapter = Adapter(config=adapter_config, modules=found, **description)
        return cast(Adapter, adapter_of(folder, metadata_of(adapter), adapter.tensors()))
    except AdapterFileError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise AdapterFileError(f"{folder} is not a PEFT folder of an InnerPiSSA adapter: {error}") from error


def _take_modules(folder: Path, config: InnerPissaConfig, tensors: dict[str, Tensor]) -> dict[str, ModuleFactors]:
    """What PEFT wrote of every module, the tensors that its configuration asks for and no others."""
    names = [key.removeprefix(PREFIX).rpartition(".innerpissa_")[0] for key in tensors if key.startswith(PREFIX)]
    found = {module: _take_module(folder, module, config, tensors) for module in sorted(set(names), key=_natural)}
    if tensors:
        raise AdapterFileError(
            f"{folder} holds the tensor {min(tensors)!r}, which its adapter_config.json does not ask for."
        )
    return found


def _take_module(folder: Path, module: str, config: InnerPissaConfig, tensors: dict[str, Tensor]) -> ModuleFactors:
    def part(name: str, *shape: int | None) -> Tensor:
        return take(folder, tensors, f"{PREFIX}{module}.innerpissa_{name}", *shape)

    s = part("S", None)
    r = s.shape[0]
    parts = {
        "U": part("U", None, r),
        "S": s,
        "V": part("V", None, r),
        "p_v": part("p_v", r, r) if config.rotate_v else None,
        "p_u": part("p_u", r, r) if config.rotate_u else None,
        "d": part("d", r) if config.scale_mode != "none" else None,
    }
    return _effective(config, parts)


def to_peft_folder(adapter: Adapter, output_dir: str | os.PathLike[str]) -> Path:
    """Write the adapter as PEFT saves it. Its skew matrices are already clamped, so the clamp is `none`."""
    config = InnerPissaConfig(
        r=adapter.config.rank,
        target_modules=sorted(adapter.modules),
        rotation=adapter.config.rotation,
        scale_mode=adapter.config.scale_mode,
        rotate_v=adapter.config.rotate_v,
        rotate_u=adapter.config.rotate_u,
        clamp="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=adapter.base_model.get("name"),
        inference_mode=True,
    )
    tensors: dict[str, Tensor] = {}
    for module, factors in adapter.modules.items():
        parts = {
            "U": factors.U,
            "S": factors.S,
            "V": factors.V,
            "p_v": factors.rotation_v / 2 if adapter.config.rotate_v else None,  # skew(A / 2) = A
            "p_u": None if factors.rotation_u is None else factors.rotation_u / 2,
            "d": factors.delta_s,
        }
        tensors |= {f"{PREFIX}{module}.innerpissa_{k}": v.contiguous() for k, v in parts.items() if v is not None}
    description = {key: value for key, value in asdict(adapter).items() if key not in ("config", "modules", "digest")}
    description["directions"] = adapter.config.directions  # to PEFT they are triples, whatever chose them
    with new_folder(output_dir) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return Path(output_dir)


def _effective(config: InnerPissaConfig, parts: dict[str, Any]) -> ModuleFactors:
    parts = {name: None if value is None else value.detach().float().cpu() for name, value in parts.items()}

    def rotation(p: Tensor | None) -> Tensor | None:
        return None if p is None else CLAMPS[config.clamp](skew(p), config.max_rotation, config.rotation)

    s = parts["S"]
    rotation_v = rotation(parts.get("p_v"))
    return ModuleFactors(
        U=parts["U"],
        S=s,
        V=parts["V"],
        rotation_v=torch.zeros(s.numel(), s.numel()) if rotation_v is None else rotation_v,
        rotation_u=rotation(parts.get("p_u")),
        delta_s=parts.get("d"),
    )


def _adapter_config(
    config: InnerPissaConfig, modules: dict[str, ModuleFactors], directions: str | None = None
) -> AdapterConfig:
    return AdapterConfig(
        rank=config.r,
        rotation=config.rotation,
        scale_mode=config.scale_mode,
        rotate_v=config.rotate_v,
        rotate_u=config.rotate_u,
        clamp=config.clamp,
        max_rotation=config.max_rotation,
        directions=directions or config.directions,
        modules=tuple(modules),
    )


def _natural(module: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in module.split(".")]
