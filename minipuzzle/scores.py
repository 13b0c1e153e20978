"""Scores: one importance per layer, and per axis and layer one per unit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from minipuzzle.architecture import SCHEMA_VERSION, Architecture, Kind
from minipuzzle.errors import UserError
from minipuzzle.jsonfile import read_json

METRICS = ("activation", "energy", "surgeon")


@dataclass(frozen=True)
class Scores:
    """Importance of everything a cut may remove; larger is more important.

    `layers`: mean squared error of the state before the head without that layer, (L,).
    `units`: (layer, axis, metric) -> one score per unit of that axis.
    `provenance`: fingerprints of model, data and settings.
    """

    kinds: tuple[Kind, ...]
    layers: torch.Tensor
    units: Mapping[tuple[int, str, str], torch.Tensor]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.layers.shape != (len(self.kinds),):
            raise UserError(
                f"{len(self.kinds)} layers need as many scores, but got {tuple(self.layers.shape)}"
            )
        for key, values in self.units.items():
            if key[2] not in METRICS or not torch.isfinite(values).all():
                raise UserError(f"scores of layer {key[0]}, `{key[1]}` ({key[2]}) are not usable")

    def save(self, folder: Path) -> None:
        """Write scores.json and scores.safetensors."""
        tensors = {f"{i}.{axis}.{metric}": v for (i, axis, metric), v in self.units.items()}
        save_file({k: v.float().contiguous() for k, v in tensors.items()}, folder / FILE)
        record = {
            "schema_version": SCHEMA_VERSION,
            "layers": [
                {"kind": kind, "hidden_mse": float(value)}
                for kind, value in zip(self.kinds, self.layers, strict=True)
            ],
            "provenance": dict(self.provenance),
        }
        (folder / "scores.json").write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Read what `save` wrote."""
        record = read_json(folder / "scores.json")
        if record.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{folder} was scored by another version; run `minipuzzle score` again")
        units = {}
        for name, values in load_file(folder / FILE).items():
            i, axis, metric = name.split(".")
            units[int(i), axis, metric] = values
        return cls(
            kinds=tuple(layer["kind"] for layer in record["layers"]),
            layers=torch.tensor(
                [layer["hidden_mse"] for layer in record["layers"]], dtype=torch.float64
            ),
            units=units,
            provenance=record["provenance"],
        )

    def check(self, architecture: Architecture) -> None:
        """UserError unless these are scores of a model of this architecture."""
        if self.kinds != tuple(layer.kind for layer in architecture.layers):
            raise UserError("the scores are of another model; run `minipuzzle score` again")


FILE = "scores.safetensors"
