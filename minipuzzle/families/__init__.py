"""The model families that minipuzzle knows: one layout table each."""

from collections.abc import Mapping
from typing import Any

from minipuzzle.architecture import Architecture
from minipuzzle.errors import UserError
from minipuzzle.families.llama import LLAMA
from minipuzzle.families.nemotron_h import NEMOTRON_H
from minipuzzle.families.table import Family, Probe, TensorLayout, TensorSpec, parameter_count

FAMILIES = {family.name: family for family in (NEMOTRON_H, LLAMA)}

OPERATIONS = {
    name: what for family in FAMILIES.values() for name, what in family.operations.items()
}
"""Class of a module in memory -> what it computes, over all families."""

__all__ = [
    "OPERATIONS",
    "FAMILIES",
    "Family",
    "Probe",
    "TensorLayout",
    "TensorSpec",
    "parameter_count",
    "read",
]


def read(config: Mapping[str, Any]) -> tuple[Family, Architecture]:
    """The family and architecture of a config.json; UserError for a model of another family."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"config.json is of model_type {model_type!r}; minipuzzle handles {known}")
    return family, family.read_config(config)
