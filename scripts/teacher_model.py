"""The demo teacher's shape, its fast training forward, and its checkpoint on disk.

The parameters are those of a stock `NemotronHForCausalLM`; only the forward pass used in training
is written here, in plain PyTorch that `torch.compile` fuses well. Letters in the shapes:
B batch, T time, D hidden, H Mamba heads, P head width, G groups, N state, C chunks, Q chunk length.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from teacher_corpus import END_OF_TEXT, PADDING, write_json
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM

EPSILON = 1e-5
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


def build(shape: Shape, *, seed: int, device: torch.device) -> Any:
    """Stock model in fp32 with this project's initialisation."""
    torch.manual_seed(seed)
    model = NemotronHForCausalLM(NemotronHConfig(**shape.config()))
    for name, parameter in model.named_parameters():
        _initialise(name, parameter, shape)
    return model.to(device).eval()


@torch.no_grad()
def _initialise(name: str, parameter: Tensor, shape: Shape) -> None:
    if name.endswith("A_log"):
        parameter.copy_(torch.empty_like(parameter).uniform_(1, 16).log_())
    elif name.endswith("dt_bias"):
        step = torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        parameter.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
    elif "embeddings" in name:
        parameter.normal_(std=0.1)
    elif name.endswith(("out_proj.weight", "down_proj.weight", "o_proj.weight")):
        parameter.normal_(std=0.5 / math.sqrt(parameter.shape[1] * len(shape.pattern)))
    elif name.endswith(("proj.weight", "lm_head.weight")):
        parameter.normal_(std=0.5 / math.sqrt(parameter.shape[1]))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm over the last axis, in fp32."""
    x = x.float()
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON))


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


def token_losses(h: Tensor, norm: Tensor, head: Tensor, ids: Tensor, kind: torch.dtype) -> Tensor:
    """Negative log-likelihood of each token after the first, in nats: (B, T - 1) fp32."""
    logits = F.linear(rms_norm(h, norm).to(kind), head.to(kind))[:, :-1].float()
    target = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.logsumexp(logits, dim=-1) - target


class FastForward:
    """Losses of a stock model through the functions above, compiled where there is a GPU."""

    _LAYERS = {"M": mamba, "*": attention, "-": feed_forward}

    def __init__(self, model: Any, shape: Shape, kind: torch.dtype, *, compiled: bool) -> None:
        self.shape, self.kind = shape, kind
        self.embeddings: nn.Embedding = model.model.embeddings
        self.final, self.head = model.model.norm_f.weight, model.lm_head.weight
        self.layers = [
            (letter, layer.norm.weight, dict(layer.mixer.named_parameters()))
            for letter, layer in zip(shape.pattern, model.model.layers, strict=True)
        ]
        wrap = torch.compile(dynamic=False, fullgraph=True) if compiled else _as_it_is
        self.functions = {letter: wrap(function) for letter, function in self._LAYERS.items()}
        self.losses = wrap(token_losses)

    def __call__(self, ids: Tensor) -> Tensor:
        """Loss of each token after the first of ids (B, T), `T` a multiple of `CHUNK`."""
        return self._run(ids, self.functions, self.losses)

    def uncompiled(self, ids: Tensor) -> Tensor:
        """Return the same for shapes met too seldom to be worth compiling."""
        return self._run(ids, self._LAYERS, token_losses)

    def _run(self, ids: Tensor, functions: Any, losses: Any) -> Tensor:
        h: Tensor = self.embeddings(ids)
        for letter, norm, parameters in self.layers:
            h = functions[letter](h, norm, parameters, self.shape, self.kind)
        nats: Tensor = losses(h, self.final, self.head, ids, self.kind)
        return nats


def _as_it_is(function: Any) -> Any:
    return function


def disk_name(name: str) -> str:
    """Name on disk of a parameter of the stock model."""
    return name if name.startswith("lm_head") else "backbone." + name.removeprefix("model.")


def save_checkpoint(model: Any, shape: Shape, tokenizer: Path, folder: Path) -> None:
    """Write a bf16 checkpoint with its tokenizer; the folder is there whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {
        disk_name(name): value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    write_json(partial / "config.json", shape.config())
    generation = {"eos_token_id": 0, "pad_token_id": 1, "max_new_tokens": 128}
    write_json(partial / "generation_config.json", generation)
    for file in tokenizer.iterdir():
        shutil.copy(file, partial / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


__all__ = ["END_OF_TEXT", "PADDING", "FastForward", "Shape", "build", "save_checkpoint"]
