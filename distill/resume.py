"""The state of a training on disk: one safetensors file, whole or not there, and the one before.

It holds the parameters and AdamW's moments by parameter name; what is not a tensor lies in the
header as JSON, with a sum of every tensor's words, since safetensors notices a file that was cut
but not one whose content changed. One file, so one rename makes it valid, and nothing in it is ever
unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minipuzzle import progress
from minipuzzle.errors import UserError
from minipuzzle.files import TEMPORARY, disk_full_is_a_user_error

CHECKPOINT_FILE = "training.safetensors"
BEFORE_FILE = "training-before.safetensors"
SCHEMA_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_training(
    work: Path, module: nn.Module, optimizer: torch.optim.Optimizer, note: dict[str, Any]
) -> None:
    """Write parameters, moments and `note` (JSON-able) to `work`; what was there is kept once more.

    Raises:
        UserError: the disk is full; what was there is still there.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained(module):
        tensors[f"parameter.{name}"] = parameter.detach()
        state = optimizer.state[parameter]
        tensors.update({f"{moment}.{name}": state[moment] for moment in MOMENTS})
    sums = {name: word_sum(tensor) for name, tensor in tensors.items()}
    text = json.dumps({"schema_version": SCHEMA_VERSION, **note, "sums": sums})
    path = work / CHECKPOINT_FILE
    temporary = work / f"{CHECKPOINT_FILE}{TEMPORARY}0"  # one process at a time works here
    # A kill leaves the old file; only a power cut could lose the new one's blocks (no fsync).
    write_whole(tensors, temporary, {"note": text}, path)
    if path.exists():
        path.replace(work / BEFORE_FILE)  # killed here, the next start finds this one
    temporary.replace(path)


def write_whole(
    tensors: dict[str, Tensor], temporary: Path, metadata: dict[str, str], path: Path
) -> None:
    """Write `temporary`, which will be renamed to `path`; nothing stays of a failed attempt."""
    try:
        with disk_full_is_a_user_error(path):
            save_file(tensors, temporary, metadata=metadata)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def word_sum(tensor: Tensor) -> int:
    """The sum of a tensor's 32-bit (or 64-bit) words, which almost any damage changes."""
    words = {4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(words).sum(dtype=torch.int64))


def load_training(
    work: Path, module: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Put what `save_training` wrote back in place and return its note; None if there is none.

    Of a damaged file the one before takes the place, which is said.

    Raises:
        UserError: no file can be read, or none fits the module.
    """
    last, before = work / CHECKPOINT_FILE, work / BEFORE_FILE
    there = [path for path in (last, before) if path.exists()]
    damage: dict[Path, str] = {}
    for path in there:
        try:
            note = _read(path, module, optimizer)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            damage[path] = (str(error).splitlines() or ["unreadable"])[0]
            continue
        if damage:
            progress.say(
                f"distill: {last.name} is damaged ({damage[last]}); "
                f"going on from the one before it, step {note['done']}"
            )
            last.unlink()  # else the next save would put it in the place of the good one
        return note
    if not there:
        return None
    names = " and ".join(path.name for path in there)
    reason = damage[there[0]]
    raise UserError(f"{work}: {names} cannot be resumed from ({reason}); remove {names}")


@torch.no_grad()
def _read(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load one file; raises whatever is wrong with it.

    Tensors are copied into memory the module and the optimizer own, as aligned as any other:
    a resumed run then computes the same bits as one that was never stopped.
    """
    with safe_open(path, framework="pt") as file:
        note: dict[str, Any] = json.loads(file.metadata()["note"])
        if note["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {note['schema_version']}")
        sums = note.pop("sums", {})
        for name, parameter in trained(module):
            parameter.copy_(_sound(file, f"parameter.{name}", sums))
            optimizer.state[parameter] = {
                moment: _owned(_sound(file, f"{moment}.{name}", sums), parameter)
                for moment in MOMENTS
            }
    return note


def _sound(file: Any, name: str, sums: dict[str, int]) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if name in sums and word_sum(tensor) != sums[name]:
        raise ValueError(f"{name} is not what was written")
    return tensor


def remove_training(work: Path) -> None:
    """Remove the states: the training is over."""
    for name in (CHECKPOINT_FILE, BEFORE_FILE):
        (work / name).unlink(missing_ok=True)


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters with a gradient, by name; tied ones appear once."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def _owned(tensor: Tensor, parameter: Tensor) -> Tensor:
    # The step counter is a scalar that the optimizer keeps beside the parameter.
    return torch.empty_like(tensor, device=parameter.device).copy_(tensor)
