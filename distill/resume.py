"""The state of a training on disk: one safetensors file, whole or not there.

It holds the parameters and AdamW's moments by parameter name; what is not a tensor lies in the
header as JSON. One file, so one rename makes it valid, and nothing in it is ever unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minipuzzle.errors import UserError
from minipuzzle.files import TEMPORARY

CHECKPOINT_FILE = "training.safetensors"
SCHEMA_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_training(
    work: Path, module: nn.Module, optimizer: torch.optim.Optimizer, note: dict[str, Any]
) -> None:
    """Write parameters, moments and `note` (JSON-able) to `work`, replacing what was there."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained(module):
        tensors[f"parameter.{name}"] = parameter.detach()
        state = optimizer.state[parameter]
        tensors.update({f"{moment}.{name}": state[moment] for moment in MOMENTS})
    text = json.dumps({"schema_version": SCHEMA_VERSION, **note})
    temporary = work / f"{CHECKPOINT_FILE}{TEMPORARY}0"  # one process at a time works here
    # A kill leaves the old file; only a power cut could lose the new one's blocks (no fsync).
    save_file(tensors, temporary, metadata={"note": text})
    temporary.replace(work / CHECKPOINT_FILE)


@torch.no_grad()
def load_training(
    work: Path, module: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Put what `save_training` wrote back in place and return its note; None if there is none.

    Tensors are copied into memory the module and the optimizer own, as aligned as any other:
    a resumed run then computes the same bits as one that was never stopped.

    Raises:
        UserError: the file cannot be read or does not fit the module.
    """
    path = work / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            note: dict[str, Any] = json.loads(file.metadata()["note"])
            if note["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {note['schema_version']}")
            for name, parameter in trained(module):
                parameter.copy_(file.get_tensor(f"parameter.{name}"))
                optimizer.state[parameter] = {
                    moment: _owned(file.get_tensor(f"{moment}.{name}"), parameter)
                    for moment in MOMENTS
                }
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise UserError(f"{path} cannot be resumed from ({reason}); remove it") from None
    return note


def remove_training(work: Path) -> None:
    """Remove the state: the training is over."""
    (work / CHECKPOINT_FILE).unlink(missing_ok=True)


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters with a gradient, by name; tied ones appear once."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def _owned(tensor: Tensor, parameter: Tensor) -> Tensor:
    # The step counter is a scalar that the optimizer keeps beside the parameter.
    return torch.empty_like(tensor, device=parameter.device).copy_(tensor)
