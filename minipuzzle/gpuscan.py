"""The Mamba-2 mixer on a GPU without `mamba_ssm`: block decomposition in plain PyTorch, no kernels.

For inference (no gradients, no cache). The stock code without `mamba_ssm` repeats B and C for every
head in fp32 and multiplies with `einsum`; here C B^T is formed once per group, products are batched
matrix products in the model's own type that accumulate in fp32, and decays and states are fp32.

Letters: B batch, T tokens, H heads, P head dim, N state size, G groups, R = H // G, Q tokens in a
chunk, K = B x chunks, J taps of the convolution.

Source: Dao & Gu, "Transformers are SSMs", arXiv 2405.21060, section 6.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 128


def scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Mamba-2 scan: state' = exp(dt a) state + dt x b^T, y = state' c + d x.

    x (B, T, H, P), dt (B, T, H) fp32 after softplus and clamping, a (H,) fp32, b and c
    (B, T, G, N), d (H,); y (B, T, H, P) in x's type. Any T. Not differentiable.
    """
    tokens = x.shape[1]
    chunk = min(chunk or CHUNK, tokens)
    missing = -tokens % chunk
    if missing:  # zeros after the end change nothing before it
        x, b, c = (F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (x, b, c))
        dt = F.pad(dt, (0, 0, 0, missing))
    batch, padded, h, p = x.shape
    g, n = b.shape[2:]
    k, r = batch * (padded // chunk), h // g
    steps = dt.view(k, chunk, h)
    cum = (steps * a).cumsum(1)  # K Q H, not positive
    inputs = x.reshape(k, chunk, h, p)
    maps_in = b.reshape(k, chunk, g, n).transpose(1, 2)  # K G Q N
    maps_out = c.reshape(k, chunk, g, n).transpose(1, 2)

    push = (steps * (cum[:, -1:] - cum).exp()).to(x.dtype)[..., None]
    pushed = (inputs * push).view(k, chunk, g, r * p).transpose(1, 2)  # K G Q RP
    states = _product(maps_in.transpose(2, 3), pushed).view(batch, -1, g, n, r, p)
    entered = _pass_on(states, cum[:, -1].view(batch, -1, g, r)).view(k, g, n, r * p)
    carried = torch.matmul(maps_out, entered.to(x.dtype)).view(k, g, chunk, r, p)

    within = _within(maps_in, maps_out, cum, steps, x.dtype)  # K H Q Q
    y = torch.matmul(within, inputs.transpose(1, 2)).view(k, g, r, chunk, p).permute(0, 3, 1, 2, 4)

    out = x.new_empty(k, chunk, g, r, p)
    entry = cum.exp().to(x.dtype).view(k, chunk, g, r, 1)
    torch.addcmul(y, carried.transpose(1, 2), entry, out=out)
    out = out.view(k, chunk, h, p).addcmul_(inputs, d.to(x.dtype)[:, None])
    return out.view(batch, padded, h, p)[:, :tokens]


def _within(b: Tensor, c: Tensor, cum: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """What token l takes of token s in its own chunk: C_l B_s exp(cum_l - cum_s) dt_s.

    b, c (K, G, Q, N); cum, steps (K, Q, H). Returns (K, H, l, s).
    """
    k, g, q, _ = b.shape
    scores = torch.matmul(c, b.transpose(2, 3)).tril_()  # K G l s
    cum, steps = cum.transpose(1, 2), steps.transpose(1, 2)  # K H Q
    # above the diagonal, where the score is zero, the exponent is positive and could overflow
    decay = (cum[..., :, None] - cum[..., None, :]).clamp_(max=0.0).exp_()
    decay = decay.mul_(steps[..., None, :]).to(dtype).view(k, g, -1, q, q)
    return decay.mul_(scores[:, :, None]).view(k, -1, q, q)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched matrix product with an fp32 result; the factors may be of a shorter type."""
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if left.dtype == torch.float32 or not left.is_cuda:
        return torch.bmm(left.float(), right.float())
    return torch.bmm(left, right, out_dtype=torch.float32)


def _pass_on(states: Tensor, total: Tensor) -> Tensor:
    """State at the entry of every chunk from what each adds: (B, chunks, G, N, R, P), in place.

    total (B, chunks, G, R): logarithm of the decay over a chunk.
    """
    decay = total.exp()[:, :, :, None, :, None]
    running = torch.zeros_like(states[:, 0])
    for i in range(states.shape[1]):
        following = torch.addcmul(states[:, i], running, decay[:, i])
        states[:, i] = running
        running = following
    return states


def convolve(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Causal depthwise convolution and SiLU over tokens: x (B, T, C), taps (C, J), oldest first."""
    reach = taps.shape[1] - 1
    out = x * taps[:, -1] if bias is None else torch.addcmul(bias, x, taps[:, -1])
    for back in range(1, min(reach, x.shape[1] - 1) + 1):
        out[:, back:].addcmul_(x[:, :-back], taps[:, reach - back])
    return F.silu(out, inplace=True)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, width: int) -> Tensor:
    """RMS norm over groups of `width` channels of x silu(gate), times weight; (..., D)."""
    gated = F.silu(gate.float()).mul_(x)
    grouped = gated.view(*gated.shape[:-1], -1, width)
    scale = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True)
    scale = scale.square_().div_(width).add_(eps).rsqrt_()
    return grouped.mul_(scale).view(gated.shape).to(x.dtype).mul_(weight)


def _mixer_forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Mamba-2 layer: (B, T, D) to (B, T, D); the stock path for caches, masks and gradients."""
    if cache_params is not None or attention_mask is not None or torch.is_grad_enabled():
        return type(self).forward(self, hidden_states, cache_params, attention_mask, **kwargs)
    inner = self.num_heads * self.head_dim
    maps = self.n_groups * self.ssm_state_size
    projected: Tensor = self.in_proj(hidden_states)
    gate, mixed, dt = projected.tensor_split((inner, 2 * (inner + maps)), -1)
    mixed = convolve(mixed, self.conv1d.weight[:, 0], self.conv1d.bias)
    x, b, c = mixed.tensor_split((inner, inner + maps), -1)
    shape = mixed.shape[:2]
    y = scan(
        x.view(*shape, self.num_heads, self.head_dim),
        F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.time_step_limit),
        -torch.exp(self.A_log.float()),
        b.view(*shape, self.n_groups, self.ssm_state_size),
        c.view(*shape, self.n_groups, self.ssm_state_size),
        self.D,
    )
    return self.out_proj(self.norm(y.reshape(*shape, inner), gate))


def _gated_norm_forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Any:
    if gate is None or torch.is_grad_enabled():
        return type(self).forward(self, hidden_states, gate)
    return gated_norm(hidden_states, gate, self.weight, self.variance_epsilon, self.group_size)


FORWARD: dict[str, Callable[..., Any]] = {
    "NemotronHMamba2Mixer": _mixer_forward,
    "NemotronHRMSNormGated": _gated_norm_forward,
}


def has_kernels() -> bool:
    """Whether `mamba_ssm` imports; transformers then uses its kernels, else plain PyTorch."""
    try:
        importlib.import_module("mamba_ssm")
    except Exception:  # a build for another torch fails in ways of its own
        return False
    return True


def install(model: nn.Module) -> int:
    """Give the instances in `model` this forward, unless there are kernels; how many changed."""
    if has_kernels():
        return 0
    changed = 0
    for module in model.modules():
        forward = FORWARD.get(type(module).__name__)
        if forward is not None and "forward" not in vars(module):
            module.forward = types.MethodType(forward, module)
            changed += forward is _mixer_forward
    return changed
