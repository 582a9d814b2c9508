"""A plugin for stock `vllm serve`: the model name `honest@0.75` is the base model with that adapter at that α."""

import os


def register() -> None:
    """The entry point `vllm.general_plugins`; costs nothing unless the environment names adapters."""
    if os.environ.get("IPISSA_ADAPTERS"):
        from ipissa.vllm import plugin

        plugin.register()
