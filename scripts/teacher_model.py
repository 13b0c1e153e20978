"""The demo teacher's shape and its fast training forward.

The parameters are those of a stock `NemotronHForCausalLM`; only the forward pass used in training
is written here, layer by layer (teacher_forward.py runs it). Letters in the shapes: B batch,
T time, D hidden, H Mamba heads, P head width, G groups, N state, C chunks, Q chunk length.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from teacher_forward import EPSILON, Route, rms_norm
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

SMALLEST_STEP = 1e-6
CHUNK = 64


@dataclass(frozen=True)
class Shape:
    """Sizes of a Nemotron-H model; `pattern` has M for Mamba, * for attention, - for FFN."""

    pattern: str
    hidden: int = 192
    ffn: int = 672
    heads: int = 24
    head_dim: int = 16
    groups: int = 2
    state: int = 64
    query_heads: int = 6
    kv_heads: int = 2
    attention_dim: int = 32
    conv: int = 4
    vocabulary: int = 4096
    context: int = 2048

    def __post_init__(self) -> None:
        """Refuse sizes that pruning or an inference engine could not handle."""
        for name in ("hidden", "ffn", "head_dim", "state", "attention_dim"):
            if getattr(self, name) % 16:
                raise ValueError(f"{name} must be a multiple of 16, not {getattr(self, name)}")
        if self.heads % 8 or self.heads % self.groups or self.inner % 64:
            raise ValueError("heads must be a multiple of 8 and of groups, heads x head_dim of 64")

    @property
    def inner(self) -> int:
        """Width of a Mamba layer inside."""
        return self.heads * self.head_dim

    @property
    def writers(self) -> int:
        """Projections that write the residual stream: one per layer."""
        return len(self.pattern)

    def stock(self) -> Any:
        """Stock model of this shape."""
        return NemotronHForCausalLM(NemotronHConfig(**self.config()))

    def route(self, model: Any) -> Route:
        """Forward pass through a stock model of this shape."""
        functions = {"M": mamba, "*": attention, "-": feed_forward}
        layers = [
            (functions[letter], layer.norm.weight, dict(layer.mixer.named_parameters()))
            for letter, layer in zip(self.pattern, model.model.layers, strict=True)
        ]
        embeddings, norm = model.model.embeddings, model.model.norm_f.weight
        return Route(embeddings, layers, norm, model.lm_head.weight)

    def parts(self, name: str) -> tuple[int, ...] | None:
        """Heights of gate, x, B, C and dt in Mamba's input projection."""
        if "in_proj" not in name:
            return None
        states = self.groups * self.state
        return (self.inner, self.inner, states, states, self.heads)

    def disk_name(self, name: str) -> str:
        """Name on disk of a parameter of the stock model."""
        return name if name.startswith("lm_head") else "backbone." + name.removeprefix("model.")

    def config(self) -> dict[str, Any]:
        """config.json as every engine reads it: pattern letters, no expert keys."""
        return {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": len(self.pattern),
            "hybrid_override_pattern": self.pattern,
            "tie_word_embeddings": False,
            "max_position_embeddings": self.context,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.attention_dim,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "intermediate_size": self.ffn,
            "mlp_hidden_act": "relu2",
            "mlp_bias": False,
            "mamba_num_heads": self.heads,
            "mamba_head_dim": self.head_dim,
            "n_groups": self.groups,
            "ssm_state_size": self.state,
            "conv_kernel": self.conv,
            "expand": math.ceil(self.inner / self.hidden),
            "chunk_size": CHUNK,
            "mamba_hidden_act": "silu",
            "mamba_proj_bias": False,
            "use_conv_bias": True,
            "use_bias": False,
            "time_step_min": SMALLEST_STEP,
            "time_step_max": 0.1,
            "time_step_floor": 1e-4,
            "layer_norm_epsilon": EPSILON,
            "initializer_range": 0.02,
            "rescale_prenorm_residual": False,
            "residual_in_fp32": False,
            "hidden_dropout": 0.0,
            "use_cache": True,
        }


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise causal convolution of x (B, T, K) with weight (K, 1, W), as W shifted products."""
    width, length = weight.shape[-1], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    taps = weight.to(x.dtype)[:, 0].unbind(-1)
    total = sum(padded[:, k : k + length] * tap for k, tap in enumerate(taps))
    return total + bias.to(x.dtype)


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba-2's recurrence in chunks of `CHUNK` (Dao and Gu 2024, arXiv 2405.21060, section 6).

    Args:
        x: (B, T, H, P); `T` a multiple of `CHUNK`.
        dt: step sizes after softplus (B, T, H), fp32.
        a: negative decay rates (H,), fp32.
        b: what enters the state (B, T, G, N).
        c: what is read from it (B, T, G, N).

    Returns:
        (B, T, H, P), without the skip term.
    """
    batch, length, heads, width = x.shape
    groups, state = b.shape[2:]
    per_group, chunks = heads // groups, length // CHUNK
    kind = x.dtype
    x = x.view(batch, chunks, CHUNK, groups, per_group, width)
    b = b.view(batch, chunks, CHUNK, groups, state).transpose(2, 3)  # B C G Q N
    c = c.view(batch, chunks, CHUNK, groups, state).transpose(2, 3)
    dt = dt.view(batch, chunks, CHUNK, groups, per_group).permute(0, 1, 3, 4, 2)  # B C G H/G Q
    decay = torch.cumsum(dt * a.view(groups, per_group, 1), dim=-1)

    # Within a chunk: a masked, decaying attention of every head over its group's C B^T.
    difference = decay[..., :, None] - decay[..., None, :]
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    weights = torch.exp(difference.masked_fill(~lower, -torch.inf)) * dt[..., None, :]
    scores = (weights * (c @ b.transpose(-1, -2)).unsqueeze(3)).to(kind)
    heads_first = x.permute(0, 1, 3, 4, 2, 5)  # B C G H/G Q P
    inside = scores @ heads_first

    # What each chunk adds to the state, and the state each chunk starts from.
    left = (torch.exp(decay[..., -1:] - decay) * dt)[..., None] * heads_first
    added = left.to(kind).transpose(-1, -2).flatten(3, 4) @ b  # B C G (H/G P) N
    total = decay[..., -1].permute(0, 2, 3, 1)  # B G H/G C
    states = added.view(batch, chunks, groups, per_group, width, state)
    start = _starting_states(states, total).flatten(3, 4)
    before = c @ start.to(kind).transpose(-1, -2)  # B C G Q (H/G P)
    before = before.view(batch, chunks, groups, CHUNK, per_group, width)
    before = before.permute(0, 1, 2, 4, 3, 5) * torch.exp(decay)[..., None]
    return (inside + before).permute(0, 1, 4, 2, 3, 5).reshape(batch, length, heads, width).to(kind)


def _starting_states(added: Tensor, total: Tensor) -> Tensor:
    """State before each chunk, from what chunks add (B, C, G, H/G, P, N) and their log decay."""
    ends = torch.cumsum(total, dim=-1)
    chunks = total.shape[-1]
    # From the end of chunk z to the start of chunk c, z < c.
    difference = (ends - total)[..., :, None] - ends[..., None, :]
    earlier = torch.ones(chunks, chunks, dtype=torch.bool, device=total.device).tril(-1)
    carried = torch.exp(difference.masked_fill(~earlier, -torch.inf)).to(added.dtype)
    flat = added.permute(0, 2, 3, 1, 4, 5).flatten(4, 5)  # B G H/G C (P N)
    states = (carried @ flat).view(*flat.shape[:-1], *added.shape[-2:])
    return states.permute(0, 3, 1, 2, 4, 5)


def mamba(h: Tensor, norm: Tensor, p: dict[str, Tensor], shape: Shape, kind: torch.dtype) -> Tensor:
    """One Mamba-2 layer with its norm and residual: h (B, T, D) fp32 to the same."""
    batch, length, _ = h.shape
    inner, states = shape.inner, shape.groups * shape.state
    projected = F.linear(rms_norm(h, norm).to(kind), p["in_proj.weight"].to(kind))
    gate, mixed, dt = torch.split(projected, [inner, inner + 2 * states, shape.heads], dim=-1)
    mixed = F.silu(causal_convolution(mixed, p["conv1d.weight"], p["conv1d.bias"]))
    x, b, c = torch.split(mixed, [inner, states, states], dim=-1)
    x = x.reshape(batch, length, shape.heads, shape.head_dim)
    b = b.reshape(batch, length, shape.groups, shape.state)
    c = c.reshape(batch, length, shape.groups, shape.state)
    dt = F.softplus(dt.float() + p["dt_bias"]).clamp(min=SMALLEST_STEP)
    y = scan(x, dt, -torch.exp(p["A_log"]), b, c) + (x * p["D"][:, None]).to(kind)
    y = y.reshape(batch, length, shape.groups, -1).float()
    y = y * F.silu(gate.float()).view_as(y)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPSILON)
    y = (y.flatten(2) * p["norm.weight"]).to(kind)
    return h + F.linear(y, p["out_proj.weight"].to(kind))


def attention(
    h: Tensor, norm: Tensor, p: dict[str, Tensor], shape: Shape, kind: torch.dtype
) -> Tensor:
    """One causal attention layer without positions, with its norm and residual."""
    x = rms_norm(h, norm).to(kind)
    heads = (*h.shape[:2], -1, shape.attention_dim)
    q, k, v = (
        F.linear(x, p[f"{name}_proj.weight"].to(kind)).view(heads).transpose(1, 2) for name in "qkv"
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return h + F.linear(y.transpose(1, 2).flatten(2), p["o_proj.weight"].to(kind))


def feed_forward(
    h: Tensor, norm: Tensor, p: dict[str, Tensor], shape: Shape, kind: torch.dtype
) -> Tensor:
    """One squared-ReLU FFN layer with its norm and residual."""
    x = F.linear(rms_norm(h, norm).to(kind), p["up_proj.weight"].to(kind))
    return h + F.linear(F.relu(x).square(), p["down_proj.weight"].to(kind))
