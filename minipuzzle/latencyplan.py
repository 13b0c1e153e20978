"""Which small models are timed for a latency table, and what their times say about the parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from minipuzzle.architecture import KINDS, Architecture, Kind, Layer
from minipuzzle.decoding import Decoder, Pool, needed_bytes
from minipuzzle.families import Family
from minipuzzle.latencygrid import HIDDEN, Grid, Place, grids, thinned
from minipuzzle.memory import Deployment

COPIES = 4  # layers of each kind in a probe
HIDDEN_KNOTS = 3

Part = tuple[Kind | None, Place]
"""A kind of layer at a point of its grid; None and (hidden,): what every model pays."""


@dataclass(frozen=True)
class Probe:
    """A small model that is timed, and the parts it is made of."""

    architecture: Architecture
    parts: Mapping[Part, int]


@dataclass(frozen=True)
class Plan:
    """The probes of a model's latency table.

    For each hidden size: `COPIES` layers of every kind; twice as many; all but one of a kind (or
    block) less; and for every other point of the grids the first with one kind changed. Every kind
    stands in every probe, as in the models that the table is for: what overlaps there (the host's
    calls with the device's work) overlaps here.
    """

    architecture: Architecture
    family: Family
    deployment: Deployment
    hidden: tuple[int, ...]
    grids: Mapping[Kind, Grid]

    @classmethod
    def make(
        cls,
        architecture: Architecture,
        family: Family,
        deployment: Deployment,
        sizes: Mapping[str, Sequence[int]],
    ) -> Plan:
        """A plan for `sizes`: axis -> sizes that candidates may have, `hidden` among the axes."""
        own = architecture.hidden
        hidden = thinned({*sizes.get(HIDDEN, ()), own}, own, HIDDEN_KNOTS)
        grids_ = grids(architecture, sizes, hidden)
        return cls(architecture, family, deployment, hidden, grids_)

    @property
    def probes(self) -> dict[str, Probe]:
        """Name -> probe."""
        return dict(self._probes())

    def needed_bytes(self, dtype: torch.dtype) -> int:
        """Memory of all probes at once."""
        models = [probe.architecture for probe in self.probes.values()]
        return needed_bytes(models, self.family, self.deployment, dtype)

    def decoders(self, config: Mapping[str, Any], pool: Pool) -> dict[str, Decoder]:
        """The probes as models that decode. `config`: the uncut model's config.json."""
        return {
            name: Decoder(probe.architecture, self.family, config, self.deployment, pool)
            for name, probe in self.probes.items()
        }

    def solve(self, seconds: Mapping[str, float]) -> tuple[dict[Part, float], float]:
        """Seconds of the parts from those of the probes, and the largest relative misfit.

        Least squares in relative errors. Where layers only come in whole blocks, their shares in
        a block's time cannot be told apart and are taken by parameters.
        """
        probes = self.probes
        parts = list(dict.fromkeys(part for probe in probes.values() for part in probe.parts))
        column = {part: j for j, part in enumerate(parts)}
        counts = np.zeros((len(probes), len(parts)))
        for i, probe in enumerate(probes.values()):
            for part, number in probe.parts.items():
                counts[i, column[part]] = number
        times = np.array([seconds[name] for name in probes])
        sizes = np.array([self._parameters(part) for part in parts], dtype=float)
        guess = sizes * (times.sum() / (counts @ sizes).sum())
        scaled = counts / times[:, None]
        found = guess + np.linalg.lstsq(scaled, 1 - scaled @ guess, rcond=None)[0]
        misfit = np.abs(scaled @ found - 1).max()
        return dict(zip(parts, found.tolist(), strict=True)), float(misfit)

    def _probes(self) -> Iterator[tuple[str, Probe]]:
        for hidden in self.hidden:
            usual = {kind: (COPIES, grid.layer) for kind, grid in self.grids.items()}
            yield f"{hidden}: usual", self._probe(hidden, usual)
            twice = {kind: (2 * COPIES, layer) for kind, (_, layer) in usual.items()}
            yield f"{hidden}: twice", self._probe(hidden, twice)
            for together in self._units():
                less = usual | {kind: (1, usual[kind][1]) for kind in together}
                yield f"{hidden}: less {'+'.join(together)}", self._probe(hidden, less)
            for kind, grid in self.grids.items():
                for place in grid.places():
                    if place[0] == hidden and place != grid.own(hidden):
                        other = usual | {kind: (COPIES, grid.layer_at(place))}
                        yield f"{hidden}: {kind} {place[1:]}", self._probe(hidden, other)

    def _units(self) -> list[tuple[Kind, ...]]:
        """Kinds that can only go together."""
        return [self.family.block] if self.family.block else [(kind,) for kind in self.grids]

    def _probe(self, hidden: int, layers: Mapping[Kind, tuple[int, Layer]]) -> Probe:
        stack = [
            layer
            for copy in range(2 * COPIES)
            for kind in KINDS
            if kind in layers
            for number, layer in [layers[kind]]
            if copy < number
        ]
        model = replace(self.architecture, hidden=hidden, layers=tuple(stack))
        parts: Counter[Part] = Counter({(None, (hidden,)): 1})
        for layer in stack:
            parts[layer.kind, self.grids[layer.kind].place(layer, hidden)] += 1
        return Probe(model, parts)

    def _parameters(self, part: Part) -> int:
        """Parameters of a part: the first guess at its share of a time."""
        kind, place = part
        one = next(iter(self.grids.values())).layer
        layer = one if kind is None else self.grids[kind].layer_at(place)
        model = replace(self.architecture, hidden=place[0], layers=(layer,))
        inside = kind is not None
        specs = self.family.tensors(model)
        return sum(spec.size for spec in specs if (spec.layer is not None) == inside)
