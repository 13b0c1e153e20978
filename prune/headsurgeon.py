"""Which heads the rest can best replace: surgeon.py for groups of columns.

Removing the columns g of a projection W (outputs, channels) and re-fitting the others costs, in the
squared error of its output, tr(W_g (H^-1_gg)^-1 W_g^T) with H the second moments of what W reads;
W and H^-1 are then updated as if these columns had never been (Kurtic et al., ZipLM, arXiv
2302.04089, equation 5). The order is nested, like that of single columns.
"""

from __future__ import annotations

import torch

from .surgeon import DAMPING


def damped_inverse(moments: torch.Tensor) -> torch.Tensor:
    """Inverse of the second moments (channels, channels) with surgeon.py's damping, in fp64."""
    damped = moments.double()
    damped = damped.clone() if damped is moments else damped
    damped.diagonal().add_(DAMPING * damped.diagonal().mean().clamp_min(1e-30))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def head_surgeon_scores(
    inverse: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Place of every head in the order of removal: 0 goes first.

    Args:
        inverse: of the damped second moments of the channels, (channels, channels), fp64.
        weight: the projection that reads them, (outputs, channels).
        columns: the channels of each head, (heads, channels each); together all of them.

    Returns:
        (heads,) in fp64 on the CPU.
    """
    order = columns.flatten().to(inverse.device)
    heads, size = columns.shape
    inverse = inverse[order][:, order].contiguous()
    rows = weight.detach().to(inverse.device).double().T[order].contiguous()  # (channels, outputs)
    gone = torch.zeros(heads, dtype=torch.bool, device=inverse.device)
    places = torch.zeros(heads, dtype=torch.float64)
    for place in range(heads):
        diagonal = _diagonal_blocks(inverse, heads, size)
        solved = torch.linalg.solve(diagonal, rows.view(heads, size, -1))
        cost = (rows.view(heads, size, -1) * solved).sum((1, 2))
        head = int(cost.masked_fill_(gone, torch.inf).argmin())
        places[head], gone[head] = place, True
        own = slice(head * size, (head + 1) * size)
        across = torch.linalg.solve(diagonal[head], inverse[own])  # (size, channels)
        rows.addmm_(across.T, rows[own].clone(), alpha=-1)
        inverse.addmm_(inverse[:, own].clone(), across, alpha=-1)
        inverse[own] = 0  # rounding left little there; keep the blocks' inverse defined
        inverse[:, own] = 0
        inverse[own, own] = torch.eye(size, dtype=torch.float64, device=inverse.device)
    return places


def _diagonal_blocks(matrix: torch.Tensor, heads: int, size: int) -> torch.Tensor:
    """(heads, size, size) from the diagonal of (heads * size, heads * size)."""
    return matrix.view(heads, size, heads, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
