"""Scores: what every layer, unit and hidden channel is worth, and the model they are for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from minipuzzle.architecture import Architecture, Kind
from minipuzzle.errors import UserError
from minipuzzle.jsonfile import read_json
from minipuzzle.metrics import LAYER_METRICS, UNIT_METRICS, Control

SCHEMA_VERSION = 2
RECORD, TENSORS = "scores.json", "scores.safetensors"
MODEL = "teacher"  # in the provenance: fingerprint of the scored checkpoint


@dataclass(frozen=True)
class Removal:
    """One step of iterative removal: the layers that went, and what every layer was worth then.

    `scores`: one per layer of the model, None for those that were gone.
    """

    layers: tuple[int, ...]
    scores: tuple[float | None, ...]


@dataclass(frozen=True)
class Scores:
    """Importance of everything a cut may remove; larger is more important.

    `layers`: metric (metrics.LayerMetric) -> one score per layer, (L,), fp64; layers that can only
    go together share one.
    `units`: (layer, axis, metric) -> one score per unit of that axis.
    `hidden`: metric -> one score per hidden channel (one choice for the whole model).
    `removals`: the steps of iterative removal, in order; () where none was asked for.
    `provenance`: fingerprints of model and data, settings.
    """

    kinds: tuple[Kind, ...]
    layers: Mapping[str, torch.Tensor]
    units: Mapping[tuple[int, str, str], torch.Tensor]
    provenance: Mapping[str, Any]
    hidden: Mapping[str, torch.Tensor] = field(default_factory=dict)
    removals: tuple[Removal, ...] = ()

    def __post_init__(self) -> None:
        for metric, values in self.layers.items():
            _require_usable(metric in LAYER_METRICS, values, f"of the layers ({metric})")
            if values.shape != (len(self.kinds),):
                raise UserError(
                    f"{len(self.kinds)} layers need as many scores, but got {tuple(values.shape)}"
                )
        for (i, axis, metric), values in self.units.items():
            _require_usable(metric in UNIT_METRICS, values, f"of layer {i}, `{axis}` ({metric})")
        for metric, values in self.hidden.items():
            _require_usable(metric in UNIT_METRICS, values, f"of the hidden channels ({metric})")

    @property
    def removal_order(self) -> tuple[tuple[int, ...], ...]:
        """Layers in the order in which iterative removal took them, those of one step together."""
        return tuple(removal.layers for removal in self.removals)

    def layer_metric(self, metric: str) -> torch.Tensor:
        """The scores of the layers by one metric, (L,); UserError when it was not measured."""
        if metric not in self.layers:
            known = ", ".join(self.layers) or "none"
            raise UserError(
                f"the layers were not scored by {metric} (only by {known}); "
                f"add it to score.metrics and run `minipuzzle score` again"
            )
        return self.layers[metric]

    def save(self, folder: Path) -> None:
        """Write scores.json and scores.safetensors."""
        tensors = {f"{i}.{axis}.{metric}": v for (i, axis, metric), v in self.units.items()}
        tensors |= {f"hidden.{metric}": values for metric, values in self.hidden.items()}
        save_file({k: v.float().contiguous() for k, v in tensors.items()}, folder / TENSORS)
        record = {
            "schema_version": SCHEMA_VERSION,
            "layers": [
                {"kind": kind, **{m: float(values[i]) for m, values in self.layers.items()}}
                for i, kind in enumerate(self.kinds)
            ],
            "removals": [vars(removal) for removal in self.removals],
            "provenance": dict(self.provenance),
        }
        text = json.dumps(record, indent=2, allow_nan=False)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Read what `save` wrote."""
        record = read_json(folder / RECORD)
        if record.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{folder} was scored by another version; run `minipuzzle score` again")
        rows = record["layers"]
        units, hidden = {}, {}
        for name, values in load_file(folder / TENSORS).items():
            where, *axis, metric = name.split(".")
            if where == "hidden":
                hidden[metric] = values
            else:
                units[int(where), axis[0], metric] = values
        return cls(
            kinds=tuple(row["kind"] for row in rows),
            layers={
                metric: torch.tensor([row[metric] for row in rows], dtype=torch.float64)
                for metric in LAYER_METRICS
                if rows and metric in rows[0]
            },
            units=units,
            provenance=record["provenance"],
            hidden=hidden,
            removals=tuple(
                Removal(tuple(step["layers"]), tuple(step["scores"])) for step in record["removals"]
            ),
        )

    def check(self, architecture: Architecture, fingerprint: str | None = None) -> None:
        """UserError unless these are scores of a model of this architecture.

        `fingerprint`: of the checkpoint about to be cut (`Checkpoint.fingerprint()`); scores made
        for other weights of the same shape are refused too.
        """
        same = self.kinds == tuple(layer.kind for layer in architecture.layers) and all(
            len(values) == getattr(architecture.layers[i], axis, -1)
            for (i, axis, _), values in self.units.items()
        )
        if not same or any(len(v) != architecture.hidden for v in self.hidden.values()):
            raise UserError("the scores are of another model; run `minipuzzle score` again")
        if fingerprint is not None and self.provenance.get(MODEL, fingerprint) != fingerprint:
            raise UserError(
                "the scores were made for a model of this shape with other weights; "
                "run `minipuzzle score` again"
            )


def _require_usable(known: bool, values: torch.Tensor, which: str) -> None:
    if not known or not torch.isfinite(values).all():
        raise UserError(f"scores {which} are not usable; run `minipuzzle score` again")


def control(name: Control, units: int, seed: int = 0) -> torch.Tensor:
    """A ranking that knows nothing of the model, as scores (units,): the largest stay.

    `order` keeps the first units, `reverse` the last, `random` any, by seed.
    """
    ascending = torch.arange(units, dtype=torch.float64)
    if name == "random":
        shuffled = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
        return ascending[shuffled]
    return ascending if name == "reverse" else ascending.flip(0)
