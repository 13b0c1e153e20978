"""What goes wrong in the middle of a training: numbers that are none, and memory that runs out."""

from __future__ import annotations

import gc
import math

import torch
from torch import Tensor, nn

from minipuzzle.errors import UserError

# What torch's CPU allocator says in a plain RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory")


class NotFinite(UserError):
    """A loss, a gradient or a measure is NaN or infinite."""


def require_finite(what: str, value: float, rows: Tensor, step: int) -> None:
    """NotFinite, with the numbers of the blocks that were read, unless `value` is finite."""
    if not math.isfinite(value):
        read = ", ".join(str(row) for row in rows.tolist())
        raise NotFinite(
            f"distillation: the {what} is {value}, not finite, at step {step} (blocks {read}); "
            f"lower distill.learning_rate or look at this text"
        )


def all_finite(module: nn.Module) -> bool:
    """Whether every parameter is finite."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU had no memory left, and this process may decide what to do.

    One of several processes may not: the others would wait for it in the middle of a step.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def release_memory() -> None:
    """Give back what nobody holds any more; errors' frames are freed before this is called."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
