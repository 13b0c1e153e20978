"""JSON objects from files, with one clear line when that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minipuzzle.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when it is missing, broken or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the folder of a complete model") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); write or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, but holds a {type(value).__name__}")
    return value
