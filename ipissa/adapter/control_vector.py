"""Read a control vector as repeng and llama.cpp keep it: a GGUF file with a direction per block.

Tensors `direction.<i>` (d,) are added after block i, times a coefficient. The file says neither which model
it was made for nor what its poles mean, so both are given.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from ipissa.adapter.vector import VectorAdapter
from ipissa.errors import AdapterFileError

ARCHITECTURE = "controlvector"
PREFIX = "direction."


def read_control_vector(
    path: str | os.PathLike[str], *, blocks: list[str], base_model: dict[str, Any], trait: dict[str, str]
) -> VectorAdapter:
    """The vector as an adapter of kind `vector`, α in the file's own unit.

    Args:
        blocks: Full module names of the base model's decoder blocks, by index.
        base_model: The `base_model` metadata (`ipissa.adapter.base_model.describe_base`).
        trait: The `trait` metadata; `positive` is what the file's direction points to.

    Raises:
        AdapterFileError: the file is no control vector, or has a direction for a block the model lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterFileError(f"{path} does not exist; check the path of the control vector.")
    try:
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = field.contents() if field else None
        found = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in reader.tensors}
    except (ValueError, OSError, TypeError, IndexError, KeyError) as error:
        raise AdapterFileError(f"{path} cannot be read as a GGUF file: {error}.") from error
    if architecture != ARCHITECTURE:
        raise AdapterFileError(f"{path} holds {architecture!r} where a control vector has {ARCHITECTURE!r}.")
    modules = {_block(path, name, blocks): direction for name, direction in found.items() if name.startswith(PREFIX)}
    _check(path, modules, base_model)
    return VectorAdapter(modules=modules, base_model=base_model, trait=trait)


def _block(path: Path, name: str, blocks: list[str]) -> str:
    index = name.removeprefix(PREFIX)
    if not index.isdecimal() or int(index) >= len(blocks):
        raise AdapterFileError(
            f"{path} has a direction for block {index!r}; the model has blocks 0 to {len(blocks) - 1}. Name the model "
            "it was made for."
        )
    return blocks[int(index)]


def _check(path: Path, modules: dict[str, Tensor], base_model: dict[str, Any]) -> None:
    if not modules:
        raise AdapterFileError(f"{path} holds no direction.")
    for direction in modules.values():
        if direction.shape != (base_model["hidden_size"],):
            raise AdapterFileError(
                f"{path} has a direction of shape {tuple(direction.shape)}; the model's states have "
                f"{base_model['hidden_size']} numbers. Name the model it was made for."
            )
        if not torch.isfinite(direction).all():
            raise AdapterFileError(f"{path} holds NaN or infinite values; the control vector is broken.")
