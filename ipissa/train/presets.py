"""Named settings: how much to train, and on which model."""

from __future__ import annotations

from typing import Any

from ipissa.adapter.config import one_of

PRESETS: dict[str, dict[str, Any]] = {
    # How much.
    "quick": {"max_prompts": 40, "max_new_tokens": 24, "epochs": 4, "lr": 2e-3, "held_out": 12},
    "thorough": {"continuations": 2, "held_out_continuations": 2},
    # Which model, with a batch that fits the memory named.
    "gemma-270m": {"model": "google/gemma-3-270m-it", "batch_size": 64},
    "gemma-1b": {"model": "google/gemma-3-1b-it", "batch_size": 64},
    "gemma-4b": {"model": "google/gemma-3-4b-it", "batch_size": 32},
    "gemma-12b": {"model": "google/gemma-3-12b-it", "batch_size": 16, "dtype": "bfloat16"},
    "qwen-0.6b-24gb": {"model": "Qwen/Qwen3-0.6B", "batch_size": 32},
    "qwen-4b-24gb": {"model": "Qwen/Qwen3-4B-Instruct-2507", "batch_size": 6, "dtype": "bfloat16"},
    "qwen-4b-80gb": {"model": "Qwen/Qwen3-4B-Instruct-2507", "batch_size": 24, "dtype": "bfloat16"},
    "qwen-4b-v1-80gb": {"model": "Qwen/Qwen3-4B", "batch_size": 24, "dtype": "bfloat16"},
    "qwen-14b-80gb": {"model": "Qwen/Qwen3-14B", "batch_size": 12, "dtype": "bfloat16"},
    "qwen-32b-80gb": {"model": "Qwen/Qwen3-32B", "batch_size": 8, "dtype": "bfloat16"},
    "llama-8b-80gb": {"model": "meta-llama/Llama-3.1-8B-Instruct", "batch_size": 24, "dtype": "bfloat16"},
}


def preset_settings(name: str | None) -> dict[str, Any]:
    """The settings of a preset; none for None.

    Raises:
        ConfigError: there is no such preset.
    """
    if name is None:
        return {}
    one_of(name, PRESETS, name="preset")
    return PRESETS[name]
