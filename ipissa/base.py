"""Which base model an adapter belongs to: recorded when it is made, checked when it is attached."""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ipissa.adapter.checkpoint import Adapter, AnyAdapter
from ipissa.adapter.vector import VectorAdapter
from ipissa.errors import BaseModelMismatchError

# Quantising or rounding a weight moves its leading singular triples by a few per cent; another
# model's weight has nothing to do with them (residual about 1.4).
MAX_RESIDUAL = 0.1
SHAPE_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size",
)  # fmt: skip


def describe_base(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """The `base_model` metadata of an adapter trained on `model`, known to users as `name`."""
    config = _text_config(model)
    return {
        "name": name,
        "architecture": (getattr(model.config, "architectures", None) or [type(model).__name__])[0],
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "fingerprint": fingerprint(model),
    }


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the shape of the model, the same for every dtype and quantisation of one base.

    It cannot tell two models of one shape apart; the adapter's own factors do that in `check_base`.
    """
    config = _text_config(model)
    shape = {key: getattr(config, key, None) for key in SHAPE_KEYS}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def block_names(model: PreTrainedModel) -> list[str]:
    """Full module names of the decoder blocks, by index."""
    name_of: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return [name_of[block] for block in model.get_decoder().layers]


def check_base(model: PreTrainedModel, adapter: AnyAdapter) -> None:
    """Raise `BaseModelMismatchError` unless `adapter` was made for `model`.

    The shapes must agree, and in three modules W V = U S must hold for the leading singular triples:
    those identify the weights themselves, whatever they were quantised to or called. A vector has no such
    mark: only the shapes are compared.
    """
    made_for = adapter.base_model.get("name", "another model")
    if adapter.base_model.get("fingerprint") != fingerprint(model):
        raise BaseModelMismatchError(
            f"The adapter {adapter.name!r} was made for {made_for}, whose shape differs from this model's; "
            "load that base model or train the adapter for this one."
        )
    if isinstance(adapter, VectorAdapter):
        return
    names = list(adapter.modules)
    for name in {names[0], names[len(names) // 2], names[-1]}:
        residual = _residual(find_linear(model, name, adapter), adapter, name)
        if not residual <= MAX_RESIDUAL:  # NaN is no match either
            raise BaseModelMismatchError(
                f"The adapter {adapter.name!r} was made for {made_for}: the singular vectors of {name} differ from "
                f"this model's (residual {residual:.2f}); load that base model or train the adapter for this one."
            )


def find_added_to(model: PreTrainedModel, name: str, adapter: VectorAdapter) -> nn.Module:
    """The block or linear layer `name` of `model`, if the adapter's direction fits its output."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise BaseModelMismatchError(
            f"The adapter {adapter.name!r} adds to {name}, which this model lacks; load the base model it was made for."
        ) from None
    width = getattr(module, "out_features", _text_config(model).hidden_size)
    if adapter.modules[name].shape != (width,):
        raise BaseModelMismatchError(
            f"The adapter {adapter.name!r} adds {adapter.modules[name].numel()} numbers to {name}, whose output has "
            f"{width}; load the base model it was made for."
        )
    return module


def find_linear(model: PreTrainedModel, name: str, adapter: Adapter) -> nn.Linear:
    """The module `name` of `model`, if the adapter's factors fit its shape."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise BaseModelMismatchError(
            f"The adapter {adapter.name!r} adapts {name}, which this model lacks; load the base model it was made for."
        ) from None
    factors = adapter.modules[name]
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if shape != (factors.U.shape[0], factors.V.shape[0]):
        raise BaseModelMismatchError(
            f"The adapter {adapter.name!r} expects {name} of shape {(factors.U.shape[0], factors.V.shape[0])}, "
            f"but this model's is {shape}; load the base model it was made for."
        )
    return cast(nn.Linear, module)  # or a quantised stand-in with the same interface


@torch.no_grad()
def _residual(module: nn.Module, adapter: Adapter, name: str) -> float:
    """‖W V - U S‖ / ‖S‖ over the leading singular triples, through the layer's own forward.

    Running the layer instead of reading its weight covers every way of storing the weight.
    """
    factors = adapter.modules[name]
    k = min(8, factors.S.numel())
    reference = next(module.parameters())
    dtype = reference.dtype if reference.is_floating_point() else torch.get_default_dtype()
    inputs = factors.V[:, :k].T.to(reference.device, dtype)  # (k, d_in)
    bias = getattr(module, "bias", None)
    outputs = module(inputs).float() - (0 if bias is None else bias.float())
    expected = (factors.U[:, :k] * factors.S[:k]).T.to(outputs)
    return float((outputs - expected).norm() / factors.S[:k].norm())


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()
