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


def surgeon_scores(moments: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Place of every unit in the order of removal: 0 goes first.

    Args:
        moments: second moments of the units, (units, units).
        weight: the projection that reads them, (outputs, units).

    Returns:
        (units,) in fp64.
    """
    units = len(moments)
    damping = DAMPING * moments.diagonal().mean().clamp_min(1e-30)
    damped = moments.double() + damping * torch.eye(units, dtype=torch.float64).to(moments.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    columns = weight.detach().double().to(moments.device).T.clone()  # (units, outputs)
    gone = torch.zeros(units, dtype=torch.bool, device=moments.device)
    places = torch.zeros(units, dtype=torch.float64)
    for place in range(units):
        cost = columns.square().sum(1) / inverse.diagonal()
        j = int(cost.masked_fill_(gone, torch.inf).argmin())
        places[j], gone[j] = place, True
        row = inverse[j] / inverse[j, j]
        columns.addr_(row, columns[j].clone(), alpha=-1)
        inverse.addr_(inverse[:, j].clone(), row, alpha=-1)
        inverse[j, j] = 1.0  # the row and column are zero now; keep the division defined
    return places
