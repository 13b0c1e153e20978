"""Element-wise parts of Mamba-2 and FFN layers with derivatives written by hand, for the CPU.

Autograd would keep and re-read every intermediate of these memory-bound operations. Each function
here keeps its inputs only and is differentiable once. All work in fp32, also under autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_Function = TypeVar("_Function", bound=Callable[..., Any])


def derivative(backward: _Function) -> _Function:
    """Decorator of a hand-written `backward`: differentiable once, without autocast."""

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return backward(ctx, *gradients)

    once: Any = once_differentiable
    result: _Function = once(run)
    return result


def call(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Apply an autograd function without autocast."""
    apply: Any = function.apply
    with torch.autocast("cpu", enabled=False):
        return apply(*args)


def conv_silu(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """silu(causal depthwise convolution + bias): x (B, T, C), taps (J, C) oldest first, bias (C,).

    Shifted multiply-adds; PyTorch's convolution needs ten times as long for its derivative here.
    """
    result: Tensor = call(_ConvSilu, x, taps, bias)
    return result


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, width: int) -> Tensor:
    """RMS norm of x * silu(gate), (..., D), over groups of `width` channels, times weight (D,)."""
    return rms_norm(call(_Gate, x, gate), weight, eps, width)


def rms_norm(x: Tensor, weight: Tensor, eps: float, width: int) -> Tensor:
    """RMS norm x / sqrt(mean(x^2) + eps) * weight over groups of `width` channels.

    x (..., D), weight (D,).
    """
    result: Tensor = call(_RmsNorm, x, weight, eps, width)
    return result


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, any shape (Primer, arXiv 2109.08668)."""
    result: Tensor = call(_ReluSquared, x)
    return result


class _ConvSilu(torch.autograd.Function):
    @staticmethod
    def _pre(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
        pre = torch.addcmul(bias, x, taps[-1])
        for back in range(1, min(len(taps), len(x))):
            pre[back:].addcmul_(x[:-back], taps[-1 - back])
        return pre

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps, bias)
        out = x.new_empty(x.shape)
        for row, out_row in zip(x, out, strict=True):  # one sequence stays in the cache
            torch.ops.aten.silu.out(_ConvSilu._pre(row, taps, bias), out=out_row)
        return out

    @staticmethod
    @derivative
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dout,) = gradients
        x, taps, bias = ctx.saved_tensors
        dx, dtaps, dbias = x.new_empty(x.shape), torch.zeros_like(taps), torch.zeros_like(bias)
        for row, dx_row, dout_row in zip(x, dx, dout, strict=True):
            dpre = torch.ops.aten.silu_backward(dout_row, _ConvSilu._pre(row, taps, bias))
            dbias += dpre.sum(0)
            torch.mul(dpre, taps[-1], out=dx_row)
            dtaps[-1] += (dpre * row).sum(0)
            for back in range(1, min(len(taps), len(row))):
                dx_row[:-back].addcmul_(dpre[back:], taps[-1 - back])
                dtaps[-1 - back] += (dpre[back:] * row[:-back]).sum(0)
        return dx, dtaps, dbias


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(x, z)
        return F.silu(z).mul_(x)

    @staticmethod
    @derivative
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dout,) = gradients
        x, z = ctx.saved_tensors
        return F.silu(z).mul_(dout), torch.ops.aten.silu_backward(dout * x, z)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, width: int) -> Tensor:
        grouped = x.reshape(-1, x.shape[-1] // width, width)
        norm = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True)
        scale = norm.square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(grouped, weight, scale)
        normed: Tensor = (grouped * scale).mul_(weight.view(-1, width))
        return normed.view(x.shape)

    @staticmethod
    @derivative
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dout,) = gradients
        x, weight, scale = ctx.saved_tensors
        weight = weight.view(x.shape[1:])
        dgrouped = dout.reshape(x.shape)
        product = dgrouped * x
        along = torch.bmm(product.transpose(0, 1), weight[:, :, None]).transpose(0, 1)
        dweight = torch.bmm(product.permute(1, 2, 0), scale.transpose(0, 1))
        dx = torch.mul(dgrouped, scale, out=product).mul_(weight)
        dx.addcmul_(x, along.mul_(scale.pow(3)).div_(-x.shape[-1]))
        return dx.view(dout.shape), dweight.view(-1), None, None


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = F.relu(x)
        ctx.save_for_backward(kept)
        return kept * kept

    @staticmethod
    @derivative
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dout,) = gradients
        (kept,) = ctx.saved_tensors
        return (dout * kept).mul_(2)
