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

FEW, MANY = 2, 8  # layers of a kind in a probe
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

    For each hidden size: one layer of every kind; `MANY` of every kind; and for every point of the
    grids many layers of that kind and size among a `FEW` of the others, so that the part in
    question is most of what is timed. Every kind stands in every probe, evenly spread as in the
    models that the table is for: what overlaps there (the host's calls with the device's work)
    overlaps here.
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
        own = {kind: grid.layer for kind, grid in self.grids.items()}
        for hidden in self.hidden:
            yield f"{hidden}: one of each", self._probe(hidden, own, dict.fromkeys(own, 1))
            yield f"{hidden}: many of each", self._probe(hidden, own, dict.fromkeys(own, MANY))
            for kind, grid in self.grids.items():
                together = self.family.block or (kind,)
                numbers = {k: MANY if k in together else FEW for k in own}
                for place in grid.places():
                    if place[0] == hidden:
                        layers = own | {kind: grid.layer_at(place)}
                        name = f"{hidden}: {kind} {grid.described(place)}"
                        yield name, self._probe(hidden, layers, numbers)

    def _probe(
        self, hidden: int, layers: Mapping[Kind, Layer], numbers: Mapping[Kind, int]
    ) -> Probe:
        stack = [layers[kind] for kind in evenly(numbers)]
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


def evenly(numbers: Mapping[Kind, int]) -> list[Kind]:
    """So many of each kind, evenly spread; equal numbers alternate in the order of `KINDS`."""
    places = [
        ((i + 0.5) / numbers[kind], order, kind)
        for order, kind in enumerate(KINDS)
        for i in range(numbers.get(kind, 0))
    ]
    return [kind for _, _, kind in sorted(places)]
