"""ipissa: steer a language model from the inside, by a continuous α.

adapter = ipissa.load_adapter("honest.safetensors")
steered = ipissa.attach(model, adapter)
with steered.alpha(0.7):
    model.generate(...)
steered.detach()
"""

from importlib.metadata import PackageNotFoundError, version

from ipissa.adapter import (
    Adapter,
    InnerPissaConfig,
    layer_alpha,
    load_adapter,
    merge,
    save_adapter,
    to_lora,
)
from ipissa.errors import IpissaError
from ipissa.models import load_model
from ipissa.steering import SteeredModel, attach

try:
    __version__ = version("ipissa")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Adapter",
    "InnerPissaConfig",
    "IpissaError",
    "SteeredModel",
    "attach",
    "layer_alpha",
    "load_adapter",
    "load_model",
    "merge",
    "save_adapter",
    "to_lora",
]
