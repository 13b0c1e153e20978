"""Which units the rest can best replace: a column-subset problem, solved greedily.

Removing unit j of a projection W (outputs, units) and re-fitting the others costs, in the squared
error of its output, |W_j|^2 / (H^-1)_jj with H the second moments of what W reads; W and H^-1 are
then updated as if j had never been (optimal brain surgeon: Hassibi and Stork, 1993; for whole
columns of a projection: Kurtic et al., ZipLM, arXiv 2302.04089). The order is nested: its last k
units are the choice of k for every k.
"""

from __future__ import annotations

import torch

DAMPING = 1e-3  # of the mean second moment, added to the diagonal
EXACT_UNITS = 2048  # up to here one unit at a time
BLOCKS = 256  # beyond: about so many removals of many units, each a share of what is left


def surgeon_scores(
    moments: torch.Tensor, weight: torch.Tensor, *, blocks: int | None = None
) -> torch.Tensor:
    """Place of every unit in the order of removal: 0 goes first; see `surgeon_order`.

    Returns:
        (units,) in fp64 on the CPU.
    """
    order, _ = surgeon_order(moments, weight, blocks=blocks)
    places = torch.empty(len(order), dtype=torch.float64)
    places[order] = torch.arange(len(order), dtype=torch.float64)
    return places


def surgeon_order(
    moments: torch.Tensor, weight: torch.Tensor, *, blocks: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Units in the order of removal, and what each one's removal adds to the squared error.

    One unit at a time is the plain greedy choice, whose updates are limited by memory speed: for
    wide layers the cheapest units go several at a time (within such a block, by their cost before
    it), and the updates for all of them are one matrix product.

    Args:
        moments: second moments of the units, (units, units).
        weight: the projection that reads them, (outputs, units).
        blocks: removals, each of as many units as the next or one more; None: one unit each up to
            EXACT_UNITS, else BLOCKS of them.

    Returns:
        Units (units,), and costs (units,) in fp64 in that order, both on the CPU.
    """
    units, device = len(moments), moments.device
    if blocks is None:
        blocks = units if units <= EXACT_UNITS else BLOCKS
    damped = moments.double().clone()
    damped.diagonal().add_(DAMPING * moments.diagonal().double().mean().clamp_min(1e-30))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    del damped
    columns = weight.detach().to(device).double().T.clone()  # (units, outputs)
    gone = torch.zeros(units, dtype=torch.bool, device=device)
    order: list[torch.Tensor] = []
    costs: list[torch.Tensor] = []
    for removal in range(blocks):
        size = units * (removal + 1) // blocks - units * removal // blocks
        cost = columns.square().sum(1) / inverse.diagonal()
        lowest, block = cost.masked_fill_(gone, torch.inf).topk(size, largest=False)
        order.append(block)
        costs.append(lowest)
        gone[block] = True
        _remove(inverse, columns, block)
    return torch.cat(order).cpu(), torch.cat(costs).cpu()


def _remove(inverse: torch.Tensor, columns: torch.Tensor, block: torch.Tensor) -> None:
    """Update H^-1 and W, transposed, as if the units of a block had never been."""
    across = inverse[block]
    factor = torch.linalg.cholesky(across[:, block])
    rows = torch.cholesky_solve(across, factor)  # (block, units)
    columns.addmm_(rows.T, columns[block], alpha=-1)
    inverse.addmm_(across.T, rows, alpha=-1)
    inverse[block, block] = 1.0  # their rows and columns are zero now; keep the division defined
