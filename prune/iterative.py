"""Iterative depth scores: the least important layer goes, and the rest is scored again.

Always against the uncut model's outputs. One-shot scores ignore that layers stand in for each
other; Nano 2 (arXiv 2508.14444, section 4) and Nemotron Elastic (arXiv 2511.16664) found this more
reliable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minipuzzle.architecture import Architecture
from minipuzzle.errors import UserError
from minipuzzle.metrics import LayerMetric
from minipuzzle.scores import Removal

Measure = Callable[[frozenset[int]], torch.Tensor]
"""Positions of the layers that are out -> what every unit is worth then, (U,)."""


@dataclass(frozen=True)
class Iteration:
    """How layers are removed one by one: by which metric, and when it is enough.

    `done` gets the positions of the layers that are out.
    """

    metric: LayerMetric
    done: Callable[[frozenset[int]], bool]


def remove_iteratively(
    architecture: Architecture,
    units: tuple[tuple[int, ...], ...],
    measure: Measure,
    done: Callable[[frozenset[int]], bool],
) -> tuple[Removal, ...]:
    """Remove units of layers until `done`; one layer of every kind always stays.

    Raises:
        UserError: when nothing is left to remove.
    """
    gone: frozenset[int] = frozenset()
    removals: list[Removal] = []
    while not done(gone):
        left = [u for u, layers in enumerate(units) if not gone & set(layers)]
        able = [u for u in left if _may_go(architecture, gone | set(units[u]))]
        if not able:
            raise UserError(
                f"iterative removal has taken {len(gone)} layers and may take no other: one of "
                "every kind stays; lower score.iterative or raise the budget"
            )
        values = measure(gone)
        lowest = min(able, key=lambda u: (float(values[u]), u))
        of_layer = {i: float(values[u]) for u in left for i in units[u]}
        scores = tuple(of_layer.get(i) for i in range(len(architecture.layers)))
        removals.append(Removal(units[lowest], scores))
        gone |= set(units[lowest])
    return tuple(removals)


def _may_go(architecture: Architecture, gone: frozenset[int]) -> bool:
    """Whether a layer of every kind is left without these."""
    layers = architecture.layers
    left = Counter(layer.kind for i, layer in enumerate(layers) if i not in gone)
    return set(left) == {layer.kind for layer in layers}
