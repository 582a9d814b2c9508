"""Which base model an adapter belongs to: recorded when it is made, checked when it is attached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from ipissa.adapter.checkpoint import Adapter, AnyAdapter
from ipissa.adapter.stored import is_packed
from ipissa.adapter.vector import VectorAdapter
from ipissa.errors import BaseModelMismatchError, ConfigError

# Quantising a weight to four bits moves what it makes of an input direction by up to a tenth, and of its leading
# singular vectors by a few per cent; another model's weight has nothing to do with them (residual about 1.4).
MAX_RESIDUAL = 0.3
SAMPLED = 256  # numbers of every weight
SAMPLED_TOKENS, SAMPLED_WIDTH = 8, 4  # of the input embeddings
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
        "embeddings": [float(f"{value:.4g}") for value in _embedding_sample(model).tolist()],
    }


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the shape of the model, the same for every dtype and quantisation of one base.

    It cannot tell two models of one shape apart; the adapter's own factors do that in `check_base`, and for
    vectors a sample of the embeddings.
    """
    return _fingerprint(_text_config(model))


def _fingerprint(config: Any) -> str:
    shape = {key: getattr(config, key, None) for key in SHAPE_KEYS}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """A short name that changes when all weights are trained: of some numbers of each, in the dtype they have."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        found.update(name.encode())
        found.update(weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)].float().cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def block_names(model: PreTrainedModel) -> list[str]:
    """Full module names of the decoder blocks, by index."""
    name_of: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return [name_of[block] for block in blocks_of(model)]


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks, by index.

    Raises:
        ConfigError: the architecture keeps them where ipissa does not look.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise ConfigError(
            f"Models of type {model.config.model_type!r} have no decoder.layers, where ipissa looks for blocks; "
            "use a model that has them, as Llama, Qwen, Gemma and Mistral do."
        )
    return list(layers)


def check_base(model: PreTrainedModel, adapter: AnyAdapter) -> None:
    """Raise `BaseModelMismatchError` unless `adapter` was made for `model`.

    The shapes must agree, and in three modules W V = U S must hold for the leading singular triples:
    those identify the weights themselves, whatever they were quantised to or called. A vector has no factors:
    the sample of the embeddings that its file holds is compared instead, where it holds one.
    """
    _check_shape(fingerprint(model), adapter)
    if isinstance(adapter, VectorAdapter):
        _check_embeddings(model, adapter)
        return
    for name in _samples(adapter):
        _check_residual(_residual(find_linear(model, name, adapter), adapter, name), adapter, name)


def check_base_files(source: str, adapter: Adapter) -> None:
    """`check_base` for a model that another engine runs, from its files: a folder, or a hub id that is in the cache.

    Weights that are packed, or stored otherwise than as safetensors, cannot be compared; their shapes are.
    """
    _check_shape(_fingerprint(AutoConfig.from_pretrained(source).get_text_config()), adapter)
    with _stored_tensors(source) as stored:
        weights = {name: stored[f"{name}.weight"] for name in adapter.modules if f"{name}.weight" in stored}
        for name in adapter.modules if weights else ():
            factors = adapter.modules[name]
            shape = list(weights[name].get_shape()) if name in weights else None
            if shape != [factors.U.shape[0], factors.V.shape[0]]:
                raise BaseModelMismatchError(
                    f"The adapter {adapter.name!r} adapts {name} as a linear layer, which this model lacks; "
                    "load the base model it was made for."
                )
        for name in _samples(adapter) if weights else ():
            factors = adapter.modules[name]
            k = min(8, factors.S.numel())
            expected = factors.U[:, :k] * factors.S[:k]
            weight = weights[name][:]
            if is_packed(weight):
                continue
            difference = weight.float() @ factors.V[:, :k] - expected
            _check_residual(float(difference.norm() / expected.norm()), adapter, name)


@contextmanager
def _stored_tensors(source: str) -> Iterator[dict[str, Any]]:
    """Slices of a model's safetensors files by name; empty where its weights are stored otherwise."""
    optional: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(source, "model.safetensors.index.json", **optional)
    files = set(json.loads(Path(index).read_text())["weight_map"].values()) if index else {"model.safetensors"}
    paths = [path for file in files if (path := cached_file(source, file, **optional))]
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        yield {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118 (not a dict)


def _samples(adapter: Adapter) -> set[str]:
    names = list(adapter.modules)
    return {names[0], names[len(names) // 2], names[-1]}


def _check_shape(found: str, adapter: AnyAdapter) -> None:
    if adapter.base_model.get("fingerprint") != found:
        raise BaseModelMismatchError(
            f"The adapter {adapter.name!r} was made for {_made_for(adapter)}, whose shape differs from this model's; "
            "load that base model or train the adapter for this one."
        )


@torch.no_grad()
def _embedding_sample(model: PreTrainedModel) -> Tensor:
    """A few numbers of the embeddings of tokens from all over the vocabulary, (32,), however they are stored."""
    embeddings = model.get_input_embeddings()
    vocabulary = _text_config(model).vocab_size
    tokens = torch.arange(0, vocabulary, max(1, vocabulary // SAMPLED_TOKENS))[:SAMPLED_TOKENS]
    vectors = embeddings(tokens.to(next(embeddings.parameters()).device))  # (tokens, d)
    return vectors[:, :SAMPLED_WIDTH].flatten().float().cpu()


def _check_embeddings(model: PreTrainedModel, adapter: VectorAdapter) -> None:
    if (recorded := adapter.base_model.get("embeddings")) is None:
        return
    expected = torch.tensor(recorded, dtype=torch.float32)
    found = _embedding_sample(model)
    if found.shape != expected.shape or not (found - expected).norm() <= MAX_RESIDUAL * expected.norm():
        raise BaseModelMismatchError(
            f"The adapter {adapter.name!r} was made for {_made_for(adapter)}, whose embeddings differ from this "
            "model's; load that base model or make the vector for this one."
        )


def _check_residual(residual: float, adapter: Adapter, name: str) -> None:
    if not residual <= MAX_RESIDUAL:  # NaN is no match either
        raise BaseModelMismatchError(
            f"The adapter {adapter.name!r} was made for {_made_for(adapter)}: the singular vectors of {name} differ "
            f"from this model's (residual {residual:.2f}); load that base model or train the adapter for this one."
        )


def _made_for(adapter: AnyAdapter) -> str:
    return adapter.base_model.get("name", "another model")


def _named(model: PreTrainedModel, name: str, adapter: AnyAdapter, does: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise BaseModelMismatchError(
            f"The adapter {adapter.name!r} {does} {name}, which this model lacks; load the base model it was made for."
        ) from None


def find_added_to(model: PreTrainedModel, name: str, adapter: VectorAdapter) -> nn.Module:
    """The block or linear layer `name` of `model`, if the adapter's direction fits its output."""
    module = _named(model, name, adapter, "adds to")
    width = getattr(module, "out_features", None)
    if width is None and module not in blocks_of(model):
        raise BaseModelMismatchError(
            f"The adapter {adapter.name!r} adds to {name!r}, which is neither a decoder block nor a linear layer "
            "of this model; load the base model it was made for, or make the vector for one of those."
        )
    width = width or _text_config(model).hidden_size
    if adapter.modules[name].shape != (width,):
        raise BaseModelMismatchError(
            f"The adapter {adapter.name!r} adds {adapter.modules[name].numel()} numbers to {name}, whose output has "
            f"{width}; load the base model it was made for."
        )
    return module


def find_linear(model: PreTrainedModel, name: str, adapter: Adapter) -> nn.Linear:
    """The module `name` of `model`, if the adapter's factors fit its shape."""
    module = _named(model, name, adapter, "adapts")
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

    Running the layer instead of reading its weight covers every way of storing the weight; without its hooks, which
    may steer it already.
    """
    factors = adapter.modules[name]
    k = min(8, factors.S.numel())
    reference = next(module.parameters())
    dtype = torch.get_default_dtype() if is_packed(reference) else reference.dtype
    inputs = factors.V[:, :k].T.to(reference.device, dtype)  # (k, d_in)
    bias = getattr(module, "bias", None)
    outputs = module.forward(inputs).float() - (0 if bias is None else bias.float())
    expected = (factors.U[:, :k] * factors.S[:k]).T.to(outputs)
    return float((outputs - expected).norm() / factors.S[:k].norm())


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()
