"""Time of a decoding step: a table per kind and size of layer, measured on the present device.

Additive: latency(architecture) = base(hidden) + the sum over its layers of seconds[kind, sizes,
hidden], linear between the sizes that were measured. `base` is what every model pays: embedding,
head, the calls around the layers. Both are solved for from the times of small stock models
(latencyplan.py). What is timed is transformers' own decoding through its cache, with random weights
in the dtype given, the deployment's context and batch: an engine or a quantised format has other
times, and the table then still ranks shapes, roughly.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipuzzle import progress
from minipuzzle.architecture import Architecture, Kind, Layer
from minipuzzle.decoding import Pool, memory_is_a_user_error, step_seconds
from minipuzzle.errors import UserError
from minipuzzle.families import Family
from minipuzzle.files import atomic_write_json
from minipuzzle.jsonfile import read_json
from minipuzzle.latencygrid import Grid, Place
from minipuzzle.latencyplan import Plan
from minipuzzle.memory import Deployment
from minipuzzle.runfolder import package_versions

SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "mamba-ssm", "causal-conv1d")
ROUNDS = 40
LIMIT_SECONDS = 120.0
NOISY = 0.1


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of a decoding step by part, and where they hold.

    `fingerprint` is of everything they depend on (see `fingerprint`), `misfit` the largest relative
    difference between a probe's time and the sum of its parts.
    """

    fingerprint: str
    conditions: Mapping[str, Any]
    hidden: int
    grids: Mapping[Kind, Grid]
    bases: Mapping[int, float]
    seconds: Mapping[Kind, Mapping[Place, float]]
    misfit: float
    _known: dict[tuple[Layer, int], float] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def measure(
        cls,
        architecture: Architecture,
        family: Family,
        config: Mapping[str, Any],
        deployment: Deployment,
        sizes: Mapping[str, Sequence[int]],
        device: str | torch.device,
        dtype: torch.dtype,
        *,
        rounds: int = ROUNDS,
        limit: float = LIMIT_SECONDS,
    ) -> LatencyTable:
        """Measure a table on `device`.

        Args:
            architecture: of the uncut model; layers of one kind have one shape.
            family: its layout table.
            config: its config.json.
            deployment: its context and batch count; its precisions do not, `dtype` does.
            sizes: axis ("width", "heads", "head_dim", "query_heads", "kv_heads", "hidden") -> the
                sizes that candidates may have, as the uncut model counts them. A few are measured.
            device: where.
            dtype: of weights, caches and states.
            rounds: how often each probe is timed.
            limit: seconds that the rounds may take; it ends with the first of the two.

        Raises:
            UserError: when the probes do not fit the device, with what they need.
        """
        plan = Plan.make(architecture, family, deployment, sizes)
        place = torch.device(device)
        with memory_is_a_user_error(plan.needed_bytes(dtype), place, "a latency table"):
            probes = plan.decoders(config, Pool(place, dtype))
            with progress.bar("latency", rounds, "rounds") as bar:
                seconds = step_seconds(probes, rounds=rounds, limit=limit, advance=bar.advance)
        table = cls.fit(plan, seconds, place, dtype)
        if table.misfit > NOISY:
            progress.say(
                f"latency: a probe takes {table.misfit:.0%} more or less than its parts; the "
                "machine is busy, or layers get in each other's way"
            )
        return table

    @classmethod
    def fit(
        cls, plan: Plan, seconds: Mapping[str, float], device: torch.device, dtype: torch.dtype
    ) -> LatencyTable:
        """The table that the times of a plan's probes (name -> seconds) give."""
        parts, misfit = plan.solve(seconds)
        conditions = conditions_of(plan, device, dtype)
        return cls(
            fingerprint=_digest(conditions),
            conditions=conditions,
            hidden=plan.architecture.hidden,
            grids=plan.grids,
            bases={hidden: parts[None, (hidden,)] for hidden in plan.hidden},
            seconds={
                kind: {place: parts[kind, place] for place in grid.places()}
                for kind, grid in plan.grids.items()
            },
            misfit=misfit,
        )

    def of(self, architecture: Architecture) -> float:
        """Seconds of a decoding step of all sequences. UserError outside the sizes measured."""
        hidden = architecture.hidden
        return self.base(hidden) + sum(self.layer(x, hidden) for x in architecture.layers)

    def layer(self, layer: Layer, hidden: int | None = None) -> float:
        """Seconds that a layer adds in a stream of width `hidden` (the uncut model's).

        Raises:
            UserError: for a kind, shape or size that was not measured.
        """
        key = (layer, hidden or self.hidden)
        if key not in self._known:
            if layer.kind not in self.grids:
                raise UserError(f"the latency table has no {layer.kind} layers; measure it again")
            grid = self.grids[layer.kind]
            self._known[key] = grid.value(self.seconds[layer.kind], *key)
        return self._known[key]

    def base(self, hidden: int | None = None) -> float:
        """Seconds that every model of this width pays. UserError outside the widths measured."""
        knots = sorted(self.bases)
        at = hidden or self.hidden
        if not knots[0] <= at <= knots[-1]:
            raise UserError(
                f"the latency table holds hidden sizes {knots[0]} to {knots[-1]}, not {at}; "
                "measure it again with that size"
            )
        return float(np.interp(at, knots, [self.bases[knot] for knot in knots]))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record; `from_json` reads it back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "conditions": dict(self.conditions),
            "hidden": self.hidden,
            "misfit": self.misfit,
            "base_seconds": [[hidden, self.bases[hidden]] for hidden in sorted(self.bases)],
            "layers": [
                grid.to_json() | {"seconds": [self.seconds[kind][p] for p in grid.places()]}
                for kind, grid in self.grids.items()
            ],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LatencyTable:
        """Read what `to_json` wrote; UserError on another schema version."""
        if record.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"this latency table has schema version {record.get('schema_version')!r}; "
                f"this minipuzzle reads {SCHEMA_VERSION}"
            )
        grids = [Grid.from_json(layers) for layers in record["layers"]]
        values = [layers["seconds"] for layers in record["layers"]]
        return cls(
            fingerprint=record["fingerprint"],
            conditions=record["conditions"],
            hidden=record["hidden"],
            grids={grid.kind: grid for grid in grids},
            bases={hidden: seconds for hidden, seconds in record["base_seconds"]},
            seconds={
                grid.kind: dict(zip(grid.places(), seconds, strict=True))
                for grid, seconds in zip(grids, values, strict=True)
            },
            misfit=record["misfit"],
        )

    def save(self, path: Path) -> None:
        """Write the table as JSON, whole or not at all."""
        atomic_write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read what `save` wrote; UserError for another kind of file."""
        try:
            return cls.from_json(read_json(path))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a latency table ({error}); delete it") from None


def fingerprint(
    architecture: Architecture,
    family: Family,
    deployment: Deployment,
    sizes: Mapping[str, Sequence[int]],
    device: str | torch.device,
    dtype: torch.dtype,
) -> str:
    """What a table measured now would have as its fingerprint: shapes, device, versions, dtype."""
    plan = Plan.make(architecture, family, deployment, sizes)
    return _digest(conditions_of(plan, torch.device(device), dtype))


def conditions_of(plan: Plan, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that a table's numbers depend on, but the quiet of the machine."""
    return {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": package_versions(PACKAGES),
        "family": plan.family.name,
        "vocabulary": plan.architecture.vocabulary,
        "tied": plan.architecture.tied,
        "biases": sorted(plan.architecture.biases),
        "context": plan.deployment.context,
        "batch": plan.deployment.batch,
        "hidden": list(plan.hidden),
        "grids": [grid.to_json() for grid in plan.grids.values()],
    }


def device_name(device: torch.device) -> str:
    """The GPU, or the kind and number of processor cores that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU cores ({platform.machine()})"


def _digest(conditions: Mapping[str, Any]) -> str:
    text = json.dumps(conditions, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
