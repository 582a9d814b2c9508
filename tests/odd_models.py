"""Tiny random models of types that differ from Llama in what their layers read or how they attend."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS = ["sliding_attention", "full_attention"] * 2
MORE = {
    "xglm": {"ffn_dim": 48, "attention_heads": 4, "num_layers": 4, "d_model": 32},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "layer_types": ["full_attention"] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "global_head_dim": 8,
        "layer_types": LAYERS,
        "sliding_window": 64,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "afmoe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
        "layer_types": LAYERS,
        "sliding_window": 64,
    },
}


def model_of(kind: str, dtype: torch.dtype = torch.float32, *, vocab_size: int = 97) -> Any:
    """A tiny random model of a type."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "vocab_size_per_layer_input": vocab_size,
            **MORE.get(kind, {}),
        },
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
