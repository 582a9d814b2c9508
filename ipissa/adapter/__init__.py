"""InnerPiSSA adapters: the PEFT tuner, the one-file format, and LoRA export.

Importing this package registers the tuner with PEFT.
"""

from ipissa.adapter.checkpoint import Adapter, AdapterConfig, ModuleFactors, load_adapter, save_adapter
from ipissa.adapter.config import InnerPissaConfig
from ipissa.adapter.layer import InnerPissaLayer
from ipissa.adapter.lora import merge, to_lora
from ipissa.adapter.model import InnerPissaModel, layer_alpha, register

register()

__all__ = [
    "Adapter",
    "AdapterConfig",
    "InnerPissaConfig",
    "InnerPissaLayer",
    "InnerPissaModel",
    "ModuleFactors",
    "layer_alpha",
    "load_adapter",
    "merge",
    "save_adapter",
    "to_lora",
]
