"""Models of random weights in the shapes that benchmarks speak of, built on the device itself.

    model = random_model("56b", "cuda", torch.bfloat16)

No weight passes through the memory of the host. Shapes: Nemotron-H 8B and 56B (arXiv 2504.03624,
section 2.1, and the configurations published with it), and a tiny one for dry runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minipuzzle import families
from minipuzzle.families import TensorSpec
from minipuzzle.model import Model, prepare, transformers_config

FIRST, PERIOD, LAST = "M-M-M-M*-", "M-M-M-M-M*-", "M-M-M-M-M-"
COMMON: dict[str, Any] = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "tie_word_embeddings": False,
    "vocab_size": 131072,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "use_conv_bias": True,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "time_step_min": 0.001,
    "rescale_prenorm_residual": False,
    "layer_norm_epsilon": 1e-5,
}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": COMMON
    | {
        "hybrid_override_pattern": FIRST + 3 * PERIOD + LAST,
        "hidden_size": 4096,
        "mamba_num_heads": 128,
        "ssm_state_size": 128,
        "num_attention_heads": 32,
        "intermediate_size": 21504,
    },
    "56b": COMMON
    | {
        "hybrid_override_pattern": FIRST + 9 * PERIOD + LAST,
        "hidden_size": 8192,
        "mamba_num_heads": 256,
        "ssm_state_size": 256,
        "num_attention_heads": 64,
        "intermediate_size": 32768,
    },
    "tiny": COMMON
    | {
        "hybrid_override_pattern": "M-M*-M-",
        "hidden_size": 64,
        "vocab_size": 512,
        "mamba_num_heads": 16,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 16,
        "chunk_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 256,
    },
}


def shape_config(shape: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a shape by name, with some of its values changed."""
    config = SHAPES[shape] | changes
    return config | {"num_hidden_layers": len(config["hybrid_override_pattern"])}


def random_tensor(
    spec: TensorSpec, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A random tensor of a model, on the generator's device, of a size that its role can bear.

    Matrices keep the variance of what they multiply, norms are near one, and the rest is small, so
    that activations neither vanish nor overflow in any number of layers.
    """
    tensor = torch.randn(spec.shape, generator=generator, device=generator.device, dtype=dtype)
    if spec.role in ("norm", "inner_norm"):
        return tensor.mul_(0.1).add_(1)
    if spec.role == "embedding":
        return tensor
    return tensor.mul_(spec.shape[1] ** -0.5 if len(spec.shape) == 2 else 0.3)


def random_tensors(
    config: dict[str, Any], device: str, dtype: torch.dtype, seed: int = 0
) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """All tensors of a model in the order of the forward pass, each made when it is asked for."""
    family, architecture = families.read(config)
    generator = torch.Generator(device).manual_seed(seed)
    for spec in family.tensors(architecture):
        yield spec, random_tensor(spec, generator, dtype)


def random_model(
    shape: str, device: str, dtype: torch.dtype, *, seed: int = 0, **changes: Any
) -> Model:
    """A model of the stock class with random weights; it has no folder and no tokenizer."""
    from transformers import AutoModelForCausalLM

    config = shape_config(shape, **changes)
    family, architecture = families.read(config)
    stock = transformers_config(family, config, architecture)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(stock, dtype=dtype)
    tensors = random_tensors(config, device, dtype, seed)
    state = {family.memory_name(spec.name): tensor for spec, tensor in tensors}
    module.load_state_dict(state, strict=True, assign=True)
    module = module.eval().requires_grad_(False)
    prepare(module, device)
    return Model(Path(f"random-{shape}"), config, family, architecture, module)
