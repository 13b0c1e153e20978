"""Bits per byte: a language model's loss in a unit that does not depend on its tokenizer."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

LOGIT_BYTES = 2**25
"""fp32 logits held at a time, unless a single sequence needs more. On a CPU twice as much cost a
third of the speed: above some size every tensor is fresh memory from the system."""


@dataclass(frozen=True)
class BitsPerByte:
    """Loss over text: ``nats`` for ``tokens`` predicted tokens that stand for ``bytes`` of it."""

    nats: float
    tokens: int
    bytes: int

    @property
    def value(self) -> float:
        """Nats / ln 2 / bytes."""
        return self.nats / math.log(2) / self.bytes


@torch.inference_mode()
def bits_per_byte(
    module: Any, blocks: torch.Tensor, lengths: torch.Tensor, *, bar: Any = None
) -> BitsPerByte:
    """The loss of a causal language model over blocks of token ids, per byte of their text.

    The first token of a block is predicted from nothing and not counted; tokens without text (the
    end-of-text between documents) are not counted either.

    Args:
        module: a transformers causal language model in eval mode.
        blocks: token ids, int64, shape (N, T).
        lengths: bytes per token id, int64, shape (V,), from ``minipuzzle.data.packing``.
        bar: something with ``advance(blocks)``, or None.

    Returns:
        Nats summed in fp64 from fp32 log probabilities.
    """
    device = next(module.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for batch in torch.split(blocks, _rows(blocks.shape[1], len(lengths))):
        ids = batch.to(device)
        counted = lengths.to(device)[ids[:, 1:]] > 0
        nats += _losses(module, ids)[counted].double().sum()
        if bar is not None:
            bar.advance(len(batch))
    sizes = lengths[blocks[:, 1:]]
    return BitsPerByte(float(nats), int((sizes > 0).sum()), int(sizes.sum()))


def _losses(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Nats of every token but the first: (B, T) ids -> (B, T - 1) fp32."""
    logits = module(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(ids.shape[0], -1)


def _rows(block: int, vocabulary: int) -> int:
    """Sequences per forward pass."""
    return max(1, LOGIT_BYTES // (4 * block * vocabulary))
