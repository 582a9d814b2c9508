"""Any setting of the dials as one LoRA, fast enough to be made while a request waits.

The right factor of ΔW(α) = B(α) Vᵀ does not depend on α, so only B(α) = U [R_u(α) diag(S(α)) R_v(α)ᵀ - diag(S)]
is computed per setting. Several adapters on one module are one LoRA of the summed rank,

    Σ B_i(α_i) V_iᵀ = [B_1 B_2 ...] [V_1 V_2 ...]ᵀ

or of the rank they share, where they have the same V: then Σ B_i(α_i) is one factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ipissa.adapter.checkpoint import Adapter, AnyAdapter, ModuleFactors
from ipissa.adapter.config import one_of
from ipissa.adapter.delta import delta_core
from ipissa.adapter.lora import TENSOR_NAME, write_lora
from ipissa.errors import ConfigError
from ipissa.models import DTYPES

Part = tuple[Tensor, list[tuple[str, ModuleFactors]]]  # Vᵀ (r, d_in), and the adapters that share it


class Baker:
    """Writes LoRA folders for settings of one set of adapters.

    Args:
        adapters: By the names that settings use; all for one base model.
        dtype: What the factors are stored in; the arithmetic of α is float64 whatever it is.

    Raises:
        ConfigError: an adapter is a vector, which adds to a module's output whatever its input.
    """

    def __init__(self, adapters: Mapping[str, AnyAdapter], *, dtype: str = "float32") -> None:
        one_of(dtype, DTYPES, name="dtype")
        self.adapters = {name: _turning(name, adapter) for name, adapter in adapters.items()}
        self._dtype = DTYPES[dtype]

    def rank(self, names: list[str] | None = None) -> int:
        """The largest rank of a module when these adapters, or all, are turned at once."""
        parts = _by_module(self.adapters, names or list(self.adapters))
        return max(sum(v.shape[0] for v, _ in shared) for shared in parts.values())

    def bake(self, steer: Mapping[str, float], folder: Path) -> None:
        """Fill an existing folder with the LoRA of {adapter: α}; adapters at 0 do nothing and are left out."""
        turned = {name: alpha for name, alpha in steer.items() if alpha}
        tensors, ranks = {}, {}
        for module, parts in _by_module(self.adapters, list(turned)).items():
            a = torch.cat([v for v, _ in parts])
            b = torch.cat([self._left_factor(shared, turned) for _, shared in parts], dim=1)
            for part, value in (("lora_A", a), ("lora_B", b)):
                tensors[TENSOR_NAME.format(module=module, part=part)] = value.to(self._dtype).contiguous()
            ranks[module] = a.shape[0]
        write_lora(folder, tensors, ranks, base=self.adapters[next(iter(turned))].base_model.get("name"))

    def _left_factor(self, shared: list[tuple[str, ModuleFactors]], steer: Mapping[str, float]) -> Tensor:
        """Σ B_i(α_i) of adapters with one V, (d_out, r). What cancels in the bracket cancels in float64."""
        total = torch.zeros_like(shared[0][1].U)
        for name, factors in shared:
            config = self.adapters[name].config
            core = delta_core(
                factors.S.double(),
                factors.rotation_v.double(),
                None if factors.rotation_u is None else factors.rotation_u.double(),
                None if factors.delta_s is None else factors.delta_s.double(),
                torch.tensor([steer[name]], dtype=torch.float64),
                rotation=config.rotation,
                scale_mode=config.scale_mode,
            )[0]
            total = total + factors.U @ core.mT.to(factors.U.dtype)
        return total


def _turning(name: str, adapter: AnyAdapter) -> Adapter:
    if not isinstance(adapter, Adapter):
        raise ConfigError(
            f"The adapter {name!r} is of kind {adapter.kind!r}, which no LoRA can do; serve it with --engine torch."
        )
    return adapter


def _by_module(adapters: Mapping[str, Adapter], names: list[str]) -> dict[str, list[Part]]:
    """What these adapters do to every module they touch, those with the same V together."""
    modules: dict[str, list[Part]] = {}
    for name in names:
        for module, factors in adapters[name].modules.items():
            parts = modules.setdefault(module, [])
            same = next((shared for v, shared in parts if torch.equal(v, factors.V.mT)), None)
            if same is None:
                parts.append((factors.V.mT, [(name, factors)]))
            else:
                same.append((name, factors))
    return modules
