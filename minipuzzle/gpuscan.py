"""Inference on a GPU: the Mamba-2 mixer and the norms with fewer passes over memory.

Gradients, autocast, caches and masks take the stock path. The scan is `mamba_ssm`'s where that is
installed. Where it is not, stock code repeats B and C for every head in fp32 and multiplies with
`einsum`; here C B^T is formed once per group, products are batched matrix products in the model's
own type that accumulate in fp32, and decays are fp32. The rest is stock arithmetic in fewer steps,
which rounds bf16 more often: see docs/on-a-gpu.md.

Letters: B batch, T tokens, H heads, P head dim, N state size, G groups, R = H // G, Q tokens in a
chunk, K = B x chunks, J taps of the convolution.

Source: Dao & Gu, "Transformers are SSMs", arXiv 2405.21060, section 6.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipuzzle.families import OPERATIONS

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
    x = x.reshape(k, chunk, h, p)
    v = x * steps.to(x.dtype)[..., None]
    b, c = (t.reshape(k, chunk, g, n).transpose(1, 2).flatten(0, 1) for t in (b, c))  # KG Q N

    leave = (cum[:, -1:] - cum).exp().to(x.dtype)[..., None]
    pushed = (v * leave).view(k, chunk, g, r * p).transpose(1, 2).flatten(0, 1)  # KG Q RP
    states = torch.bmm(pushed.transpose(1, 2), b).view(batch, -1, h, p * n)
    entered = _pass_on(states, cum[:, -1].view(batch, -1, h)).view(k * g, r * p, n)
    carried = torch.bmm(c, entered.transpose(1, 2)).view(k, g, chunk, r, p)

    within = _within(torch.bmm(c, b.transpose(1, 2)), cum)  # KH Q Q
    y = torch.bmm(within, v.transpose(1, 2).flatten(0, 1)).view(k, g, r, chunk, p)

    out = torch.empty_like(v).view(k, chunk, g, r, p)
    entry = cum.exp().to(x.dtype).view(k, chunk, g, r, 1)
    torch.addcmul(y.permute(0, 3, 1, 2, 4), carried.transpose(1, 2), entry, out=out)
    out = out.view(k, chunk, h, p).addcmul_(x, d.to(x.dtype)[:, None])
    return out.view(batch, padded, h, p)[:, :tokens]


def _within(scores: Tensor, cum: Tensor) -> Tensor:
    """What token l takes of dt x at token s in its own chunk: C_l B_s exp(cum_l - cum_s).

    scores (K G, l, s): C_l B_s; cum (K, Q, H). Returns (K H, l, s) in the type of the scores.
    """
    k, q, h = cum.shape
    cum = cum.transpose(1, 2)  # K H Q
    decay = (cum[..., :, None] - cum[..., None, :]).exp_().view(k, -1, h * k // len(scores), q, q)
    result = scores.new_empty(decay.shape)
    torch.mul(decay, scores.view(k, -1, 1, q, q), out=result)
    # above the diagonal the exponent is positive and may have overflowed: whatever is there goes
    return result.view(k * h, q, q).tril_()


def _pass_on(states: Tensor, total: Tensor) -> Tensor:
    """State at the entry of every chunk from what each chunk adds to it: (B, chunks, H, P N).

    total (B, chunks, H): logarithm of the decay over a chunk.
    """
    reach = total.cumsum(1).transpose(1, 2)  # B H chunks
    before = reach - total.transpose(1, 2)
    decay = (before[..., :, None] - reach[..., None, :]).exp_().tril_(-1).to(states.dtype)
    entered = [torch.bmm(d, s.transpose(0, 1)) for d, s in zip(decay, states, strict=True)]
    return torch.stack(entered).transpose(1, 2).contiguous()


def convolve(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Causal depthwise convolution and SiLU over tokens: x (B, T, C), taps (C, J), oldest first."""
    reach = taps.shape[1] - 1
    out = x * taps[:, -1] if bias is None else torch.addcmul(bias, x, taps[:, -1])
    for back in range(1, min(reach, x.shape[1] - 1) + 1):
        out[:, back:].addcmul_(x[:, :-back], taps[:, reach - back])
    return F.silu(out, inplace=True)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, width: int) -> Tensor:
    """RMS norm over groups of `width` channels of x silu(gate), times weight; (..., D)."""
    gated = F.silu(gate).mul_(x)
    grouped = gated.view(*gated.shape[:-1], -1, width)
    return F.rms_norm(grouped, (width,), None, eps).view(gated.shape).mul_(weight)


def _mixer_forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Mamba-2 layer: (B, T, D) to (B, T, D); the stock path for caches and masks too."""
    special = cache_params is not None or attention_mask is not None
    if special or not _is_plain(self.conv1d, hidden_states):
        return self.stock.forward(self, hidden_states, cache_params, attention_mask, **kwargs)
    inner = self.num_heads * self.head_dim
    maps = self.n_groups * self.ssm_state_size
    projected: Tensor = self.in_proj(hidden_states)
    gate, mixed, dt = projected.tensor_split((inner, 2 * (inner + maps)), -1)
    mixed = convolve(mixed, self.conv1d.weight[:, 0], self.conv1d.bias)
    x, b, c = mixed.tensor_split((inner, inner + maps), -1)
    shape = mixed.shape[:2]
    run = (kernel_scan() if x.is_cuda else None) or scan
    y = run(
        x.view(*shape, self.num_heads, self.head_dim),
        F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.time_step_limit),
        -torch.exp(self.A_log.float()),
        b.view(*shape, self.n_groups, self.ssm_state_size),
        c.view(*shape, self.n_groups, self.ssm_state_size),
        self.D,
    )
    return self.out_proj(self.norm(y.reshape(*shape, inner), gate))


def _gated_norm_forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Any:
    if gate is None or not _is_plain(self, hidden_states, gate):
        return self.stock.forward(self, hidden_states, gate)
    return gated_norm(hidden_states, gate, self.weight, self.variance_epsilon, self.group_size)


def _norm_forward(self: Any, hidden_states: Tensor) -> Any:
    if not _is_plain(self, hidden_states):
        return self.stock.forward(self, hidden_states)
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _is_plain(module: Any, *tensors: Tensor) -> bool:
    """Whether all are of the weight's type, and neither gradients nor autocast are wanted."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(module.weight.device.type):
        return False
    return all(tensor.dtype == module.weight.dtype for tensor in tensors)


_OF_OPERATION: dict[str, Callable[..., Any]] = {
    "mamba2": _mixer_forward,
    "rms_norm": _norm_forward,
    "gated_rms_norm": _gated_norm_forward,
}
FORWARD = {name: _OF_OPERATION[what] for name, what in OPERATIONS.items()}  # by the module's class


@functools.cache
def kernel_scan() -> Callable[..., Tensor] | None:
    """`mamba_ssm`'s Triton scan with the arguments of `scan`; None where it does not import."""
    try:
        module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except Exception:  # a build for another torch fails in ways of its own
        return None
    combined = module.mamba_chunk_scan_combined

    def run(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        y: Tensor = combined(x, dt, a, b, c, CHUNK, D=d)
        return y

    return run


def install(model: nn.Module) -> int:
    """Give the modules in `model` this forward; how many Mamba layers changed.

    A module becomes of a subclass of its class. A forward set on the instance would refer back to
    it, and a dropped model's memory would stay taken until the next garbage collection.
    """
    changed = 0
    for module in model.modules():
        stock = type(module)
        if stock.__name__ in FORWARD and not hasattr(stock, "stock"):
            module.__class__ = _with_own_forward(stock)
            changed += FORWARD[stock.__name__] is _mixer_forward
    return changed


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        module.__class__ = getattr(type(module), "stock", type(module))


def _with_own_forward(stock: type[nn.Module]) -> type[nn.Module]:
    if stock not in _OWN:
        own = {"forward": FORWARD[stock.__name__], "stock": stock, "__doc__": stock.__doc__}
        _OWN[stock] = type(stock.__name__, (stock,), own)
    return _OWN[stock]


_OWN: dict[type[nn.Module], type[nn.Module]] = {}
