"""Fast CPU forward for the Mamba-2, norm and squared-ReLU modules of a stock model.

`install` replaces the forward of instances only. Letters: B batch, T tokens, D hidden width,
H heads, P head dim, N state size, G groups, R = H // G, J taps of the convolution.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipuzzle.families import OPERATIONS
from minipuzzle.fastops import conv_silu, gated_rms_norm, relu_squared, rms_norm
from minipuzzle.ssd import scan_with_state, ssd_reference, ssd_scan

__all__ = ["install", "ssd_reference", "ssd_scan", "uninstall"]


def _stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class, past the one set on the instance."""
    return type(module).forward(module, *args, **kwargs)


def _is_fast(*tensors: Tensor) -> bool:
    """Whether all are fp32 on the CPU, and the first not a single token: there calls cost most."""
    small = tensors[0].dim() > 1 and tensors[0].shape[-2] == 1
    return not small and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def _norm_forward(self: Any, hidden_states: Tensor) -> Any:
    if not _is_fast(hidden_states, self.weight):
        return _stock(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon, self.weight.shape[0])


def _gated_norm_forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Any:
    if gate is None or not _is_fast(hidden_states, self.weight):
        return _stock(self, hidden_states, gate)
    weight, eps = self.weight, self.variance_epsilon
    return gated_rms_norm(hidden_states, gate.float(), weight, eps, self.group_size)


def _relu_squared_forward(self: Any, x: Tensor) -> Any:
    return relu_squared(x) if _is_fast(x) else _stock(self, x)


def _mixer_forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Mamba-2 layer: hidden states (B, T, D) to (B, T, D); the mask is (B, T), 0 for padding."""
    if hidden_states.device.type != "cpu":
        return _stock(self, hidden_states, cache_params, attention_mask, **kwargs)
    if cache_params is not None and hidden_states.shape[1] == 1:
        if attention_mask is None and _can_step(self, cache_params, hidden_states):
            return _mixer_step(self, hidden_states, cache_params)
        return _stock(self, hidden_states, cache_params, attention_mask, **kwargs)
    return _mixer_sequence(self, hidden_states, cache_params, attention_mask)


def _mixer_sequence(self: Any, hidden_states: Tensor, cache: Any, mask: Tensor | None) -> Any:
    dtype, tokens = hidden_states.dtype, hidden_states.shape[1]
    if mask is not None:
        hidden_states = (hidden_states * mask[:, :, None]).to(dtype)
    gate, mixed, dt = _project(self, hidden_states)
    state = None
    if cache is not None:
        state = cache.get_recurrent_state(self.layer_idx, state_idx=0)
        past = {"conv_kernel_size": self.conv_kernel_size}
        mixed = cache.update_conv_state(mixed.transpose(1, 2), self.layer_idx, **past)
        mixed = mixed.transpose(1, 2)
    mixed = conv_silu(mixed.float(), *_taps_and_bias(self.conv1d))[:, -tokens:]
    if mask is not None:
        mixed = mixed * mask[:, :, None]
    x, b, c = _split_heads(self, mixed)
    dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.time_step_limit)
    a = -torch.exp(self.A_log.float())
    y, final = scan_with_state(x, dt, a, b, c, self.D, initial_state=state)
    if cache is not None:
        cache.update_recurrent_state(final, layer_idx=self.layer_idx)
    return self.out_proj(self.norm(y.flatten(2), gate).to(dtype))


def _can_step(self: Any, cache: Any, hidden_states: Tensor) -> bool:
    """Whether the states of `cache` may be updated in place by `_mixer_step`."""
    state = cache.get_recurrent_state(self.layer_idx, state_idx=0)
    stepping = state is not None and not cache.is_recording_past(self.layer_idx)
    fp32 = stepping and all(
        t.device.type == "cpu" and t.dtype == torch.float32
        for t in (state, hidden_states, self.conv1d.weight)
    )
    return fp32 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _mixer_step(self: Any, hidden_states: Tensor, cache: Any) -> Any:
    """One token (B, 1, D), updating the states in `cache`; like the stock step it leaves dt as is.

    The stock step runs a convolution and one exponential per state element for each token.
    """
    gate, mixed, dt = _project(self, hidden_states)
    taps, bias = _taps_and_bias(self.conv1d)
    window = cache.get_conv_state(self.layer_idx, state_idx=0)  # B C J
    window.copy_(torch.cat([window[..., 1:], mixed.transpose(1, 2)], -1))
    x, b, c = _split_heads(self, F.silu((window * taps.t()).sum(-1) + bias)[:, None])
    state = cache.get_recurrent_state(self.layer_idx, state_idx=0)  # B H P N
    dt = F.softplus(dt + self.dt_bias)[:, 0, :, None]  # B H 1
    state.mul_(torch.exp(dt * -torch.exp(self.A_log)[:, None])[..., None])
    by_group = state.view(b.shape[0] * b.shape[2], -1, state.shape[-1])  # B G, R P, N
    pushed = (x[:, 0] * dt).reshape(len(by_group), -1, 1)
    by_group.baddbmm_(pushed, b.reshape(len(by_group), 1, -1))
    y = torch.bmm(by_group, c.reshape(len(by_group), -1, 1)).view(x.shape) + x * self.D[:, None]
    return self.out_proj(self.norm(y.flatten(2), gate))


def _project(self: Any, hidden_states: Tensor) -> tuple[Tensor, ...]:
    """`in_proj` as gate (B, T, H P), x with B and C (B, T, H P + 2 G N), dt (B, T, H)."""
    inner = self.num_heads * self.head_dim
    mixed = inner + 2 * self.n_groups * self.ssm_state_size
    parts: tuple[Tensor, ...] = self.in_proj(hidden_states).split(
        [inner, mixed, self.num_heads], -1
    )
    return parts


def _split_heads(self: Any, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, H P + 2 G N) as x (B, T, H, P), b and c (B, T, G, N)."""
    maps = self.n_groups * self.ssm_state_size
    inner = mixed.shape[-1] - 2 * maps
    x, b, c = mixed.tensor_split((inner, inner + maps), dim=-1)
    maps_shape = (*mixed.shape[:2], self.n_groups, self.ssm_state_size)
    x = x.view(*mixed.shape[:2], self.num_heads, self.head_dim)
    return x, b.view(maps_shape), c.view(maps_shape)


def _taps_and_bias(conv: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """The depthwise convolution's weights (J, C), oldest tap first, and bias (C,), in fp32."""
    taps = conv.weight.float().squeeze(1).t().contiguous()
    return taps, taps.new_zeros(taps.shape[1]) if conv.bias is None else conv.bias.float()


_OF_OPERATION: dict[str, Callable[..., Any]] = {
    "mamba2": _mixer_forward,
    "rms_norm": _norm_forward,
    "gated_rms_norm": _gated_norm_forward,
}
_FAST_FORWARD: dict[str, Callable[..., Any]] = {  # by the module's class
    **{name: _OF_OPERATION[what] for name, what in OPERATIONS.items()},
    "ReLUSquaredActivation": _relu_squared_forward,  # transformers', of no family
}


def install(model: nn.Module) -> int:
    """Give the instances in `model` (not their classes) the fast forward; the Mamba layers changed.

    Modules, parameters and hooks stay as they are: `in_proj`, `norm` (called with the scan output
    and the gate) and `out_proj` are still called as modules. Tensors elsewhere than on the CPU and
    single-token decoding take the stock path. Calling it twice changes nothing.
    """
    changed = 0
    for module in model.modules():
        name = type(module).__name__
        if name in _FAST_FORWARD and "forward" not in vars(module):
            module.forward = types.MethodType(_FAST_FORWARD[name], module)
            changed += _FAST_FORWARD[name] is _mixer_forward
    return changed


def uninstall(model: nn.Module) -> int:
    """Undo `install`; the number of Mamba layers changed back."""
    changed = 0
    for module in model.modules():
        name = type(module).__name__
        own = getattr(vars(module).get("forward"), "__func__", None)
        if own is not None and own is _FAST_FORWARD.get(name):
            del module.forward
            changed += _FAST_FORWARD[name] is _mixer_forward
    return changed
