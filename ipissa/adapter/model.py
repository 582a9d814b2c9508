"""InnerPiSSA as a PEFT tuner: which modules it replaces, and how α is set on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ipissa.adapter.config import PEFT_TYPE, InnerPissaConfig
from ipissa.adapter.layer import InnerPissaLayer, Linear
from ipissa.adapter.lora import check_mergeable

# The residual writers: the two projections of a block that add to the residual stream.
RESIDUAL_WRITERS = ["o_proj", "down_proj"]
MODULE_SETS = {
    "residual": RESIDUAL_WRITERS,
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


class InnerPissaModel(BaseTuner):
    """Wraps a model's target modules in `InnerPissaLayer`s; made by `peft.get_peft_model`."""

    prefix: str = "innerpissa_"
    tuner_layer_cls = InnerPissaLayer
    target_module_mapping = dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "smollm3"],
        RESIDUAL_WRITERS,
    )

    def _create_and_replace(
        self,
        peft_config: InnerPissaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, InnerPissaLayer):
            target.update_layer(adapter_name, peft_config)
            return
        new_module = Linear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _check_merge_allowed(self) -> None:
        layers = {name: each for name, each in self.model.named_modules() if isinstance(each, InnerPissaLayer)}
        check_mergeable(self.model, {name: layer.base_linear() for name, layer in layers.items()})


@contextmanager
def layer_alpha(model: nn.Module, alpha: float | Tensor) -> Iterator[None]:
    """Run a PEFT-wrapped model at α, a number or one value per batch row, and restore the old α after.

    The layers' parameters are untouched, and gradients flow to them. Layers of other tuners follow if
    `add_dial` gave them an α.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer) and hasattr(module, "alpha")]
    before = [layer.alpha for layer in layers]
    try:
        for layer in layers:
            layer.alpha = alpha
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.alpha = old


def register() -> None:
    """Make `InnerPissaConfig` known to PEFT.

    PEFT's own register function accepts only members of its `PeftType` enum, so this fills the
    mappings that function fills; the enum stays as it is. Safe to call more than once.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = InnerPissaConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = InnerPissaModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = InnerPissaModel.prefix
