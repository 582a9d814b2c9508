"""The trainable InnerPiSSA layer: a frozen linear layer plus its rotated, rescaled singular triples."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ipissa.adapter.config import InnerPissaConfig
from ipissa.adapter.delta import delta_core
from ipissa.adapter.frame import frame_core, frame_of, images, initial_frame
from ipissa.adapter.stored import is_packed
from ipissa.errors import AlphaError
from ipissa.rotation import CLAMPS, skew


class InnerPissaLayer(BaseTunerLayer):
    """Adds x V [R_v(α) diag(S(α)) R_u(α)ᵀ - diag(S)] Uᵀ to a linear layer's output.

    U (d_out, r), S (r,), V (d_in, r) come from the layer's own thin SVD and stay frozen; the free
    parameters are P_v and P_u (r, r), whose skew parts generate the rotations, and d (r,). With learnt
    directions there is one parameter, their frame, and nothing frozen (`ipissa.adapter.frame`). No
    residual weight is stored, the bias is untouched, and at α = 0 the sum is exactly the base layer.

    Merged form: W + U [R_u(α) diag(S(α)) R_v(α)ᵀ - diag(S)] Vᵀ at the α in force when merging.
    """

    adapter_layer_names: tuple[str, ...] = (
        "innerpissa_p_v",
        "innerpissa_p_u",
        "innerpissa_d",
        "innerpissa_frame",
    )
    other_param_names: tuple[str, ...] = ("innerpissa_U", "innerpissa_S", "innerpissa_V", "innerpissa_config")

    def __init__(self, base_layer: nn.Module) -> None:
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"InnerPiSSA adapts nn.Linear, not {type(base_layer).__name__}.")
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.base_layer: nn.Linear = base_layer
        self.innerpissa_p_v = nn.ParameterDict()
        self.innerpissa_p_u = nn.ParameterDict()
        self.innerpissa_d = nn.ParameterDict()
        self.innerpissa_frame = nn.ParameterDict()
        self.innerpissa_U = BufferDict(persistent=True)
        self.innerpissa_S = BufferDict(persistent=True)
        self.innerpissa_V = BufferDict(persistent=True)
        self.innerpissa_config: dict[str, InnerPissaConfig] = {}
        self.alpha: float | Tensor = 1.0  # a number, or one value per batch row (batch,)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_deltas: dict[str, Tensor] = {}

    def update_layer(self, adapter_name: str, config: InnerPissaConfig, inference_mode: bool = False) -> None:
        """Create the parameters of one adapter, and freeze the singular triples it turns."""
        self.innerpissa_config[adapter_name] = config
        if config.directions == "learnt":
            r = min(config.r, self.in_features // 2 * 2, self.out_features // 2 * 2)
            self.innerpissa_frame[adapter_name] = nn.Parameter(initial_frame(self.in_features, r, config.init_std))
        else:
            self._adapt_triples(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.directions == "triples":  # now: PEFT's move rounds what is there to the base's dtype
            self.keep_triples(adapter_name, torch.arange(self._rank(config)))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _adapt_triples(self, adapter_name: str, config: InnerPissaConfig) -> None:
        r = self._rank(config)
        if config.rotate_v:
            self.innerpissa_p_v[adapter_name] = nn.Parameter(_initial_rotation(r, config.init_std))
        if config.rotate_u:
            self.innerpissa_p_u[adapter_name] = nn.Parameter(_initial_rotation(r, config.init_std))
        if config.scale_mode != "none":
            self.innerpissa_d[adapter_name] = nn.Parameter(torch.empty(r).uniform_(1e-5, 1e-3))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """The thin SVD of the base weight in float32: U (d_out, k), S (k,) falling, V (d_in, k)."""
        return thin_svd(self.base_linear())

    def _rank(self, config: InnerPissaConfig) -> int:
        return min(config.r, self.in_features, self.out_features)

    def keep_triples(self, adapter_name: str, indices: Tensor) -> None:
        """Adapt these singular triples (r,) instead of the largest; their values stay the weight's own."""
        u, s, v = self.svd()
        indices = indices.to(s.device)
        self.innerpissa_U[adapter_name] = u[:, indices].contiguous()
        self.innerpissa_S[adapter_name] = s[indices].contiguous()
        self.innerpissa_V[adapter_name] = v[:, indices].contiguous()

    def skew_matrices(self, adapter_name: str) -> tuple[Tensor | None, Tensor | None]:
        """The effective (clamped) A_v and A_u, each (r, r) or None where that side does not rotate."""
        config = self.innerpissa_config[adapter_name]

        def effective(side: nn.ParameterDict) -> Tensor | None:
            if adapter_name not in side:
                return None
            return CLAMPS[config.clamp](skew(side[adapter_name]), config.max_rotation, config.rotation)

        return effective(self.innerpissa_p_v), effective(self.innerpissa_p_u)

    def core(self, adapter_name: str, alpha: Tensor) -> Tensor:
        """The bracket of the class equation for each α, K(α) of a learnt frame; alpha (n,) -> (n, r, r).

        In float32 also under autocast: it is a small difference of large numbers, and must be zero at α = 0.
        """
        config = self.innerpissa_config[adapter_name]
        with torch.autocast(alpha.device.type, enabled=False):
            if adapter_name in self.innerpissa_frame:
                frame = frame_of(self.innerpissa_frame[adapter_name])
                return frame_core(frame, alpha.to(frame), rotation=config.rotation)
            d = self.innerpissa_d.get(adapter_name, None)
            s = self.innerpissa_S[adapter_name]
            return delta_core(
                s,
                *self.skew_matrices(adapter_name),
                d,
                alpha.to(s),
                rotation=config.rotation,
                scale_mode=config.scale_mode,
            )

    def outer_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """U (d_out, r) and V (d_in, r), or W F and F of a learnt frame: what the core (r, r) stands between."""
        if adapter_name in self.innerpissa_U:
            return self.innerpissa_U[adapter_name], self.innerpissa_V[adapter_name]
        frame = frame_of(self.innerpissa_frame[adapter_name])
        return images(self.base_linear(), self.original_weight(), frame), frame

    def original_weight(self) -> Tensor:
        """The base layer's weight as it was before anything was merged into it."""
        return next(iter(self._merged_deltas.values()), self.base_linear().weight)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW(α) = U coreᵀ Vᵀ (d_out, d_in) at the layer's present α, which must be one number."""
        alpha = torch.as_tensor(self.alpha, dtype=torch.float32).reshape(-1)
        if alpha.numel() != 1:
            raise ValueError(f"A weight has one α, but {alpha.numel()} are set; set a single number to merge.")
        u, v = self.outer_factors(adapter_name)
        return u @ self.core(adapter_name, alpha)[0].mT @ v.mT

    def base_linear(self) -> nn.Linear:
        """The frozen layer under all adapters."""
        return cast(nn.Linear, self.get_base_layer())

    def add_deltas(self, result: Tensor, x: Tensor) -> Tensor:
        """`result` plus the delta of every active adapter."""
        for name in self.active_adapters:
            if name in self.innerpissa_config:
                result = result + self.delta(x, name).to(result.dtype)
        return result

    def delta(self, x: Tensor, adapter_name: str) -> Tensor:
        """x V core(α) Uᵀ with one α per row; x (batch, tokens, d_in) -> (batch, tokens, d_out).

        A mixture of experts gives (tokens, d_in), which has no rows: one α is for all of them.
        """
        u, v = self.outer_factors(adapter_name)
        alpha = torch.as_tensor(self.alpha, dtype=u.dtype, device=u.device).reshape(-1)
        if alpha.numel() > 1 and x.dim() == 2:
            raise AlphaError(
                f"{alpha.numel()} α are set, but a layer of {x.shape[1]} inputs is given {len(x)} tokens without their "
                "rows, as those of a mixture of experts are; adapt other modules, or set one α."
            )
        if alpha.numel() > 1 and alpha.numel() != x.shape[0]:
            raise ValueError(f"{alpha.numel()} α are set for a batch of {x.shape[0]} rows; set one per row.")
        # Few distinct α share the rows of a batch: solve once for each and gather.
        distinct, row = torch.unique(alpha, return_inverse=True)
        core = self.core(adapter_name, distinct)[row]  # (batch or 1, r, r)
        return (x.to(v.dtype) @ v) @ (core[0] if x.dim() == 2 else core) @ u.mT


class Linear(nn.Module, InnerPissaLayer):
    """`InnerPissaLayer` for `nn.Linear`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: InnerPissaConfig) -> None:
        nn.Module.__init__(self)
        InnerPissaLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        return self.add_deltas(result, x)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW(α) of the given (default: active) adapters to the base weight."""
        weight = self.base_linear().weight
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.innerpissa_config:
                continue
            before = weight.data.clone()
            after = before + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not torch.isfinite(after).all():
                raise ValueError(f"Merging adapter {name!r} would give non-finite weights; it seems broken.")
            self._merged_deltas[name] = before  # kept so that unmerging is exact in any dtype
            weight.data = after
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put back the weights as they were before `merge`, exactly."""
        while self.merged_adapters:
            self.base_linear().weight.data = self._merged_deltas.pop(self.merged_adapters.pop())

    def __repr__(self) -> str:
        return "innerpissa." + super().__repr__()


@torch.no_grad()
def dense_weight(linear: nn.Linear) -> Tensor:
    """The weight (d_out, d_in) in float32, whatever a layer stores it as.

    Quantised layers are asked what they do to each input direction: some repack their weights when they
    first run, after which dequantising what is stored gives another matrix. Hooks are no part of the weight.
    """
    if not is_packed(linear.weight):
        return linear.weight.detach().float()
    identity = torch.eye(linear.in_features, device=linear.weight.device)
    columns = linear.forward(identity) - (0 if linear.bias is None else linear.bias)
    return columns.T.float()


def thin_svd(linear: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of a layer's weight in float32: U (d_out, k), S (k,) falling, V (d_in, k)."""
    u, s, vh = torch.linalg.svd(dense_weight(linear), full_matrices=False)
    return u, s, vh.T


def _initial_rotation(r: int, std: float) -> Tensor:
    x = nn.init.trunc_normal_(torch.empty(r, r), std=std, a=-2 * std, b=2 * std) if std else torch.zeros(r, r)
    return skew(x)
