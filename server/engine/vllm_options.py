"""What vLLM is started with: our settings in its terms, and the operator's options over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from transformers import AutoConfig
from vllm import AsyncEngineArgs
from vllm.config.lora import MaxLoRARanks
from vllm.platforms import current_platform

from ipissa.errors import ConfigError
from ipissa.models import resolve_dtype

DEFAULT_MAX_LORAS = 8
SCORE_ROWS = 8  # places in the batch that only scores use
SCORE_SETTINGS = 4  # and of those, for different settings
CPU_CACHE_TOKENS = 65536  # vLLM's CPU build would otherwise take most of the machine's memory
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
OURS = (
    "model",
    "dtype",
    "enable_lora",
    "max_logprobs",
    "logprobs_mode",
    "runner",
    "skip_tokenizer_init",
    "worker_extension_cls",
)


@dataclass(frozen=True)
class Plan:
    """How vLLM is started, and how many different settings generations may have in one batch."""

    arguments: dict[str, Any]
    max_loras: int
    max_rank: int  # 0 without LoRAs


def plan(
    source: str,
    *,
    rank: int,
    modules: Iterable[str],
    device: str,
    dtype: str,
    max_batch: int,
    max_model_len: int | None,
    max_cache_tokens: int | None,
    options: Mapping[str, Any],
) -> Plan:
    """The arguments of `AsyncEngineArgs`.

    Args:
        source: Folder or hub id of the model.
        rank: What a composition of all adapters needs; 0 if there are none.
        modules: The linear layers that adapters change; the others are spared the cost of LoRAs.
        options: Arguments of vLLM's by name, which win.

    Raises:
        ConfigError: an option is unknown or ours to set, or the rank or the device is not to be had.
    """
    _check_names(options)
    _check_device(device)
    max_loras = int(options.get("max_loras", DEFAULT_MAX_LORAS))
    max_rank = allowed_rank(int(options.get("max_lora_rank", rank)), rank)
    arguments: dict[str, Any] = {
        "model": source,
        "dtype": _dtype(dtype),
        "max_model_len": max_model_len,
        "max_num_seqs": max_batch + SCORE_ROWS,
        "max_logprobs": -1,  # scores read whole distributions
        "disable_log_stats": True,
        "enforce_eager": current_platform.is_cpu(),
        **options,
    }
    if max_rank:
        places = max_loras + SCORE_SETTINGS
        defaults = {"max_cpu_loras": 4 * places, "lora_target_modules": layers_of(modules) or None}
        arguments = {**defaults, **arguments, "enable_lora": True, "max_loras": places, "max_lora_rank": max_rank}
        arguments["worker_extension_cls"] = "ipissa.vllm.worker.SteeredWorker"
    cache_tokens = max_cache_tokens or (CPU_CACHE_TOKENS if current_platform.is_cpu() else None)
    if cache_tokens and not {"kv_cache_memory_bytes", "num_gpu_blocks_override"} & options.keys():
        arguments["kv_cache_memory_bytes"] = _cache_bytes(source, arguments, cache_tokens)
    return Plan(arguments, max_loras, max_rank)


def allowed_rank(asked: int, needed: int) -> int:
    """The smallest maximum that vLLM knows and that is at least `asked`; 0 for 0."""
    if asked < needed:
        raise ConfigError(
            f"The adapters together have rank {needed}, more than max_lora_rank {asked}; raise it, or serve fewer."
        )
    ranks = sorted(get_args(MaxLoRARanks))
    if asked > ranks[-1]:
        raise ConfigError(
            f"The adapters together have rank {asked}, and vLLM takes at most {ranks[-1]}; "
            "serve fewer adapters at a time, or train them with a smaller rank."
        )
    return 0 if asked == 0 else next(rank for rank in ranks if rank >= asked)


def layers_of(modules: Iterable[str]) -> list[str]:
    """The modules, and the layers that vLLM packs some of them into."""
    packed = {child: layer for layer, children in PACKED.items() for child in children}
    layers = set()
    for module in modules:
        path, _, name = module.rpartition(".")
        layers |= {module} | ({f"{path}.{packed[name]}"} if name in packed else set())
    return sorted(layers)


def _check_names(options: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(AsyncEngineArgs)}
    for name in options:
        if name in OURS:
            instead = f" or use --{name}" if name in ("model", "dtype") else ""
            raise ConfigError(f"The vLLM option {name!r} is set by ipissa-serve; leave it out{instead}.")
        if name not in known:
            raise ConfigError(f"vLLM has no engine option {name!r}; `vllm serve --help=all` lists them.")


def _check_device(device: str) -> None:
    if device not in ("auto", current_platform.device_type):
        raise ConfigError(
            f"device {device!r} was asked for, but this build of vLLM runs on {current_platform.device_type}; use auto."
        )


def _dtype(dtype: str) -> str:
    """bfloat16 where there is an accelerator and float32 on a CPU, unless asked otherwise."""
    place = torch.device("cpu" if current_platform.is_cpu() else "cuda")
    return str(resolve_dtype(dtype, place)).removeprefix("torch.")


def _cache_bytes(source: str, arguments: Mapping[str, Any], tokens: int) -> int:
    """Memory of the keys and values of so many tokens, in each worker."""
    config = AutoConfig.from_pretrained(source).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    here = -(-heads // int(arguments.get("tensor_parallel_size", 1)))
    width = torch.empty(0, dtype=getattr(torch, arguments["dtype"])).element_size()
    return 2 * config.num_hidden_layers * here * dim * width * tokens
