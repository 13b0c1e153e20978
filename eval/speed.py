"""Tokens per second in prefill and decode, fair between models on a machine that is not quiet."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Speed:
    """Tokens per second of all sequences of the batch together, medians."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def measure(
    modules: Mapping[str, Any], prompt: torch.Tensor, *, tokens: int, repeats: int, bar: Any = None
) -> dict[str, Speed]:
    """Time the same greedy generation with every model, turn by turn.

    Every repeat runs all models one after the other, so that a slow minute of the machine slows
    all of them; the median over repeats forgets a slow second. One short run of each model before
    that warms caches and compiles kernels.

    Args:
        modules: name -> transformers causal language model in eval mode; all fit in memory.
        prompt: token ids, int64, shape (B, T).
        tokens: tokens to decode one by one after the prompt, at least 1.
        repeats: how often, at least 1.
        bar: something with ``advance()``, called once per model and repeat, or None.

    Returns:
        name -> Speed.
    """
    assert tokens >= 1 and repeats >= 1, (tokens, repeats)
    for module in modules.values():
        _generate(module, prompt, min(tokens, WARM_UP_TOKENS))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in modules}
    for _ in range(repeats):
        for name, module in modules.items():
            seconds[name].append(_generate(module, prompt, tokens))
            if bar is not None:
                bar.advance()
    return {
        name: Speed(
            prefill_tokens_per_second=prompt.numel() / statistics.median(p for p, _ in pairs),
            decode_tokens_per_second=len(prompt) * tokens / statistics.median(d for _, d in pairs),
        )
        for name, pairs in seconds.items()
    }


@torch.inference_mode()
def _generate(module: Any, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds of the prompt's pass and of ``tokens`` greedy steps through the cache."""
    ids = prompt.to(next(module.parameters()).device)
    start = _now(ids)
    out = module(input_ids=ids, use_cache=True, logits_to_keep=1)
    following = out.logits[:, -1:].argmax(-1)
    filled = _now(ids)
    for _ in range(tokens):
        out = module(input_ids=following, past_key_values=out.past_key_values, use_cache=True)
        following = out.logits[:, -1:].argmax(-1)
    return filled - start, _now(ids) - filled


def _now(like: torch.Tensor) -> float:
    """The clock, once the device of ``like`` has finished what it was given."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
