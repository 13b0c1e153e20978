"""Tiny models with random weights, written without transformers' own saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minipuzzle import families
from minipuzzle.writer import write_checkpoint

CONFIG: dict[str, Any] = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "hybrid_override_pattern": "M-M*-M-",
    "num_hidden_layers": 7,
    "hidden_size": 32,
    "vocab_size": 97,
    "tie_word_embeddings": False,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "chunk_size": 16,
    "use_conv_bias": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "time_step_min": 1e-6,
    "rescale_prenorm_residual": False,
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "vocab_size": 97,
    "tie_word_embeddings": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {"nemotron_h": CONFIG, "llama": LLAMA}


def write_tiny(
    folder: Path,
    *,
    family: str = "nemotron_h",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """A model folder with random weights large enough that every part of it matters."""
    config = CONFIGS[family] | changes
    if "hybrid_override_pattern" in changes:
        config["num_hidden_layers"] = len(changes["hybrid_override_pattern"])
    table, architecture = families.read(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for spec in table.tensors(architecture):
        tensor = torch.randn(spec.shape, generator=generator)
        if spec.role in ("norm", "inner_norm"):
            tensor = 1 + 0.1 * tensor
        elif len(spec.shape) == 2:
            tensor = tensor / spec.shape[1] ** 0.5
        else:
            tensor = 0.3 * tensor
        tensors.append((spec.name, tensor.to(dtype)))
    write_checkpoint(folder, config, tensors, sync=False)
    return folder
