"""The processes that share a job under `accelerate launch` (or torchrun); one where there is none.

Sequences are shared out by rank, sums are added up over all processes, the first one writes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FIRST = 0


def started_as_follower() -> bool:
    """Whether a launcher started this process beside the one that writes and speaks."""
    return int(os.environ.get("RANK", FIRST)) != FIRST


@dataclass(frozen=True)
class Processes:
    """This process's place among those that share the job."""

    rank: int = FIRST
    size: int = 1
    device: str = "cpu"

    @classmethod
    def current(cls) -> Processes:
        """Join the processes that the launcher started; alone where it started none."""
        import torch

        on_gpu = torch.cuda.is_available()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device="cuda" if on_gpu else "cpu")
        from accelerate import PartialState

        state: Any = PartialState(cpu=not on_gpu)
        device = str(state.device) if on_gpu else "cpu"
        return cls(state.process_index, state.num_processes, device)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == FIRST

    def share(self, ids: torch.Tensor) -> torch.Tensor:
        """This process's sequences of ids (B, T)."""
        return ids[self.rank :: self.size]

    def sum(self, *tensors: torch.Tensor) -> None:
        """Replace tensors by their sums over all processes, which all call this in one order."""
        if self.size > 1:
            from torch import distributed

            for tensor in tensors:
                if tensor.numel():
                    distributed.all_reduce(tensor)

    def agree(self, yes: bool) -> bool:
        """What the first process says."""
        import torch

        flag = torch.tensor([float(yes and self.first)], dtype=torch.float64, device=self.device)
        self.sum(flag)
        return bool(flag.item())
