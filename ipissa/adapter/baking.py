"""Any setting of the dials as one LoRA, fast enough to be made while a request waits.

The right factor of ΔW(α) = B(α) Vᵀ does not depend on α, so only B(α) = U [R_u(α) diag(S(α)) R_v(α)ᵀ - diag(S)]
is computed per setting. Several adapters on one module are one LoRA of the summed rank,

    Σ B_i(α_i) V_iᵀ = [B_1 B_2 ...] [V_1 V_2 ...]ᵀ

or of the rank they share, where V_i spans what an earlier V does: with V_i = V T_i the sum is (Σ B_i(α_i) T_iᵀ) Vᵀ.
Adapters that keep the same singular triples of the same weight do, but for the rounding of the machines they were
made on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ipissa.adapter.checkpoint import Adapter, AnyAdapter, ModuleFactors
from ipissa.adapter.config import one_of
from ipissa.adapter.delta import delta_core
from ipissa.adapter.lora import TENSOR_NAME, turning, write_lora
from ipissa.models import DTYPES

SAME_SPAN = 1e-3  # of a right factor may lie outside another, where it is taken to lie inside


@dataclass(frozen=True)
class _Part:
    """A right factor V (d_in, r), and the adapters that share it: name, factors, and T (r, own rank) of each."""

    v: Tensor
    shared: list[tuple[str, ModuleFactors, Tensor]]

    def joined_by(self, name: str, factors: ModuleFactors) -> bool:
        """Share this factor with one more adapter, if its own lies inside."""
        turn = self.v.mT @ factors.V
        outside = torch.dist(factors.V, self.v @ turn)
        if outside > SAME_SPAN * factors.V.norm():
            return False
        self.shared.append((name, factors, turn))
        return True


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
        self.adapters = {name: turning(adapter, name) for name, adapter in adapters.items()}
        self._dtype = DTYPES[dtype]

    def rank(self, names: list[str] | None = None) -> int:
        """The largest rank of a module when these adapters are turned at once, or, of no names, any of all."""
        if names:
            return max(_rank(parts) for parts in _by_module(self.adapters, names).values())
        modules = {module for adapter in self.adapters.values() for module in adapter.modules}
        return max(_largest_rank(self.adapters, module) for module in modules)

    def bake(self, steer: Mapping[str, float], folder: Path) -> None:
        """Fill an existing folder with the LoRA of {adapter: α}; adapters at 0 do nothing and are left out."""
        turned = {name: alpha for name, alpha in steer.items() if alpha}
        tensors, ranks = {}, {}
        for module, parts in _by_module(self.adapters, list(turned)).items():
            a = torch.cat([part.v.mT for part in parts])
            b = torch.cat([self._left_factor(part, turned) for part in parts], dim=1)
            for side, value in (("lora_A", a), ("lora_B", b)):
                tensors[TENSOR_NAME.format(module=module, part=side)] = value.to(self._dtype).contiguous()
            ranks[module] = a.shape[0]
        write_lora(folder, tensors, ranks, base=self.adapters[next(iter(turned))].base_model.get("name"))

    def _left_factor(self, part: _Part, steer: Mapping[str, float]) -> Tensor:
        """Σ B_i(α_i) T_iᵀ of the adapters that share V, (d_out, r). What cancels in the bracket cancels in float64."""
        total = torch.zeros(())
        for name, factors, turn in part.shared:
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
            total = total + factors.U @ core.mT.to(factors.U.dtype) @ turn.mT
        return total


def _by_module(adapters: Mapping[str, Adapter], names: list[str]) -> dict[str, list[_Part]]:
    """What these adapters do to every module they touch, those that share a right factor together."""
    modules = {module: None for name in names for module in adapters[name].modules}
    return {module: _parts(adapters, names, module) for module in modules}


def _parts(adapters: Mapping[str, Adapter], names: Collection[str], module: str) -> list[_Part]:
    found = {name: adapters[name].modules[module] for name in sorted(names) if module in adapters[name].modules}
    parts: list[_Part] = []
    for name, factors in sorted(found.items(), key=lambda item: -item[1].V.shape[1]):  # small may lie inside large
        if not any(part.joined_by(name, factors) for part in parts):
            own = torch.eye(factors.V.shape[1])
            parts.append(_Part(factors.V, [(name, factors, own)]))
    return parts


def _rank(parts: list[_Part]) -> int:
    return sum(part.v.shape[1] for part in parts)


def _largest_rank(adapters: Mapping[str, Adapter], module: str) -> int:
    """Of a module, whichever of the adapters are turned: without the one they share with, others stand alone."""
    largest, left = 0, {frozenset(adapters)}
    seen: set[frozenset[str]] = set()
    while left:
        names = left.pop()
        seen.add(names)
        parts = _parts(adapters, names, module)
        largest = max(largest, _rank(parts))
        left |= {names - {part.shared[0][0]} for part in parts if len(part.shared) > 1} - seen
    return largest
