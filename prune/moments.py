"""Second moments of what a projection reads, and the least-squares problems they answer."""

from __future__ import annotations

import torch

from minipuzzle.errors import UserError

WIDE = 16384  # from here on moments are kept in fp32: 8 GiB a matrix in fp64 for 32768 channels


class Moments:
    """Sums over tokens of a a^T and a y^T: a is what a projection reads, y what is wanted of it.

    Chunks are multiplied in fp32 and summed in fp64 (in fp32 from `WIDE` channels on).
    """

    def __init__(self, channels: int, outputs: int, device: torch.device | str = "cpu") -> None:
        dtype = torch.float64 if channels < WIDE else torch.float32
        self.gram = torch.zeros(channels, channels, dtype=dtype, device=device)
        self.cross = torch.zeros(channels, outputs, dtype=dtype, device=device)

    def add(self, read: torch.Tensor, wanted: torch.Tensor) -> None:
        """Take a (N, channels) and y (N, outputs)."""
        read, wanted = read.float(), wanted.float()
        self.gram += read.T @ read
        self.cross += read.T @ wanted


def ridge_solution(
    gram: torch.Tensor, cross: torch.Tensor, ridge: float, *, where: str = "a projection"
) -> torch.Tensor:
    """W (outputs, channels) that minimises sum |y - W a|^2 + r |W|^2.

    Args:
        gram: sum of a a^T, (channels, channels).
        cross: sum of a y^T, (channels, outputs).
        ridge: r relative to the mean of the diagonal of `gram`.
        where: names the place in an error.

    Raises:
        UserError: when activations were not finite.
    """
    return torch.cholesky_solve(cross, damped_cholesky(gram, ridge, where=where)).T


def damped_cholesky(gram: torch.Tensor, ridge: float, *, where: str) -> torch.Tensor:
    """Cholesky factor of a matrix (n, n) with `ridge` times its mean diagonal added to it.

    Raises:
        UserError: for a matrix with values that are not finite.
    """
    if not bool(torch.isfinite(gram.diagonal()).all()):
        raise UserError(
            f"the activations that {where} reads are not finite; check the weights of both models "
            "and the dtype they run in"
        )
    damped = gram.clone()
    damped.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-30))
    factor: torch.Tensor = torch.linalg.cholesky(damped)
    return factor
