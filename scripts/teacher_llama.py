"""A small Llama trained by the demo teacher's script: the family that other pruners know.

The parameters are those of a stock `LlamaForCausalLM`; the forward pass used in training is written
here like the hybrid's in teacher_model.py. Letters in the shapes:
B batch, T time, D hidden, H heads, P head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from teacher_forward import EPSILON, Route, rms_norm
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama with `blocks` pairs of attention and gated FFN."""

    blocks: int = 8
    hidden: int = 256
    ffn: int = 704
    query_heads: int = 8
    kv_heads: int = 4
    attention_dim: int = 32
    vocabulary: int = 4096
    context: int = 2048

    def __post_init__(self) -> None:
        """Refuse sizes that pruning or the stock class could not handle."""
        for name in ("hidden", "ffn", "attention_dim"):
            if getattr(self, name) % 16:
                raise ValueError(f"{name} must be a multiple of 16, not {getattr(self, name)}")
        if self.query_heads % self.kv_heads or self.hidden % self.query_heads:
            raise ValueError("query heads must be a multiple of KV heads and divide hidden")

    @property
    def writers(self) -> int:
        """Projections that write the residual stream: two per block."""
        return 2 * self.blocks

    def stock(self) -> Any:
        """Stock model of this shape."""
        return LlamaForCausalLM(LlamaConfig(**self.config()))

    def route(self, model: Any) -> Route:
        """Forward pass through a stock model of this shape."""
        layers = []
        for block in model.model.layers:
            mixer = dict(block.self_attn.named_parameters())
            layers.append((attention, block.input_layernorm.weight, mixer))
            mlp = dict(block.mlp.named_parameters())
            layers.append((feed_forward, block.post_attention_layernorm.weight, mlp))
        return Route(
            model.model.embed_tokens, layers, model.model.norm.weight, model.lm_head.weight
        )

    def parts(self, name: str) -> tuple[int, ...] | None:
        """No matrix stacks several maps."""
        return None

    def disk_name(self, name: str) -> str:
        """Names on disk are those of the stock model."""
        return name

    def config(self) -> dict[str, Any]:
        """config.json; the rotary base stands in the new and in the old place."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.attention_dim,
            "hidden_act": "silu",
            "rms_norm_eps": EPSILON,
            "rope_theta": ROTARY_BASE,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "max_position_embeddings": self.context,
            "initializer_range": 0.02,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
            "use_cache": True,
        }


def rotate(x: Tensor) -> Tensor:
    """Rotary positions 0 .. T-1 on x (B, H, T, P), each half of P a coordinate of P/2 planes."""
    length, width = x.shape[-2:]
    planes = torch.arange(0, width, 2, device=x.device, dtype=torch.float32)
    positions = torch.arange(length, device=x.device, dtype=torch.float32)
    angles = positions[:, None] * ROTARY_BASE ** (-planes / width)
    cosine, sine = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1).to(x.dtype)


def attention(
    h: Tensor, norm: Tensor, p: dict[str, Tensor], shape: LlamaShape, kind: torch.dtype
) -> Tensor:
    """One causal attention with rotary positions, its norm and residual: h (B, T, D) to same."""
    x = rms_norm(h, norm).to(kind)
    heads = (*h.shape[:2], -1, shape.attention_dim)
    q, k, v = (
        F.linear(x, p[f"{name}_proj.weight"].to(kind)).view(heads).transpose(1, 2) for name in "qkv"
    )
    y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
    return h + F.linear(y.transpose(1, 2).flatten(2), p["o_proj.weight"].to(kind))


def feed_forward(
    h: Tensor, norm: Tensor, p: dict[str, Tensor], shape: LlamaShape, kind: torch.dtype
) -> Tensor:
    """One FFN gated by SiLU with its norm and residual."""
    x = rms_norm(h, norm).to(kind)
    gate, up = (F.linear(x, p[f"{name}_proj.weight"].to(kind)) for name in ("gate", "up"))
    return h + F.linear(F.silu(gate) * up, p["down_proj.weight"].to(kind))
