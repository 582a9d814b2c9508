"""InnerPiSSA adapters: the PEFT tuner, the one-file format, and LoRA export.

Importing this package registers the tuner with PEFT.
"""

from ipissa.adapter.checkpoint import (
    Adapter,
    AdapterConfig,
    AnyAdapter,
    ModuleFactors,
    load_adapter,
    load_innerpissa,
    save_adapter,
)
from ipissa.adapter.config import InnerPissaConfig
from ipissa.adapter.layer import InnerPissaLayer
from ipissa.adapter.lora import merge, to_lora
from ipissa.adapter.model import InnerPissaModel, layer_alpha, register
from ipissa.adapter.vector import VectorAdapter

register()

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AnyAdapter",
    "InnerPissaConfig",
    "InnerPissaLayer",
    "InnerPissaModel",
    "ModuleFactors",
    "VectorAdapter",
    "layer_alpha",
    "load_adapter",
    "load_innerpissa",
    "merge",
    "save_adapter",
    "to_lora",
]
