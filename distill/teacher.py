"""Where the teacher's final hidden states come from: computed on the way, or kept in memory.

Letters: B sequences, T tokens of a sequence, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from .sharding import gathered


class Teacher(Protocol):
    """What the trainer asks of a teacher of some blocks."""

    @property
    def head(self) -> Tensor:
        """(V, E), the weight of its head."""

    def hidden(self, rows: Tensor) -> Tensor:
        """(B, T, E), the states just before the head of blocks number `rows` (B,)."""


@runtime_checkable
class Targets(Protocol):
    """Stored distributions of some blocks: a loss against them, without hidden states."""

    def loss(self, rows: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
        """Mean over tokens, a scalar: student states (B x T, D), head (V, D), blocks `rows` (B,).

        An estimate of KL(teacher || student) at temperature 1, in nats.
        """


def final_hidden(module: nn.Module, ids: Tensor) -> Tensor:
    """(B, T) ids -> (B, T, D), the input of the head (final norm applied)."""
    model = cast(Any, module)
    hidden: Tensor = model.get_decoder()(input_ids=ids, use_cache=False)[0]
    return hidden


def head_weight(module: nn.Module) -> Tensor:
    """(V, D), the weight of a causal language model's head; put together where it is sharded."""
    return gathered(cast(Any, module).get_output_embeddings().weight)


class OnlineTeacher:
    """Runs the teacher on each batch it is asked for: no memory, one forward pass a step."""

    def __init__(self, module: nn.Module, blocks: Tensor) -> None:
        self._module, self._blocks = module.eval(), blocks
        self.head = head_weight(module).detach()

    @torch.no_grad()
    def hidden(self, rows: Tensor) -> Tensor:
        """(B, T, E) of blocks number `rows`."""
        return final_hidden(self._module, self._blocks[rows].to(self.head.device))


class TeacherStates:
    """The teacher's final hidden states of all blocks, computed once, kept in memory unrounded.

    For several students on the same blocks, or for more than one pass over them. Takes
    blocks x T x E values of the module's dtype (256 x 512 x 192 in fp32: 100 MB). States are
    computed in order, `batch` blocks at a time, so they do not depend on who asks for them.
    """

    def __init__(self, module: nn.Module, blocks: Tensor, *, batch: int = 8) -> None:
        online = OnlineTeacher(module, blocks)
        self.head = online.head
        numbers = torch.arange(len(blocks))
        self._states = torch.cat([online.hidden(rows) for rows in torch.split(numbers, batch)])

    def hidden(self, rows: Tensor) -> Tensor:
        """(B, T, E) of blocks number `rows`."""
        return self._states[rows.to(self._states.device)]
