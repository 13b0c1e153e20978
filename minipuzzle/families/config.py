"""What the families' readers and writers of config.json share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minipuzzle.architecture import Architecture, Kind, Layer
from minipuzzle.errors import UserError


def integer(config: Mapping[str, Any], *keys: str) -> int:
    """The value of the first of `keys` that is there; UserError unless it is one integer."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is not None:
            raise UserError(f"config.json: `{key}` must be one integer, but is {value!r}")
    raise UserError(f"config.json lacks `{keys[0]}`; is this a complete configuration?")


def uniform(architecture: Architecture, kind: Kind) -> Layer | None:
    """The one shape of a kind's layers, None without any; UserError where they differ."""
    found = {layer for layer in architecture.layers if layer.kind == kind}
    if len(found) > 1:
        raise UserError(
            f"the {kind} layers have {len(found)} different shapes; this format holds one shape "
            "per kind: select uniform widths"
        )
    return next(iter(found), None)
