"""Predicted training memory against what one training step really allocates.

    python scripts/check_training_memory.py
    python scripts/check_training_memory.py --shape 8b --student-share 50% --device cuda

One step of two micro-batches runs through the trainer; every tensor that an operator returns is
counted until it is freed (torch's dispatch mode; temporaries inside an operator are not seen), on a
GPU it is `max_memory_allocated`. What autograd keeps is counted by its own hooks. The first form
takes the bundled teacher and a tiny model of random weights and records the largest error of a
total as `plan_memory_error_percent_demo`, the second as `plan_memory_error_percent`.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import RESULTS, record
from random_model import random_model, shape_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minipuzzle import families
from minipuzzle.architecture import FFNLayer
from minipuzzle.distill.config import Settings
from minipuzzle.distill.teacher import OnlineTeacher, final_hidden
from minipuzzle.distill.trainer import make_optimizer, train_step
from minipuzzle.model import Model, load
from minipuzzle.progress import table
from minipuzzle.source import demo_teacher
from minipuzzle.training_memory import Training, training_memory
from minipuzzle.units import format_bytes


@dataclass(frozen=True)
class Case:
    """A student, its teacher and a micro-batch."""

    name: str
    student: Model
    teacher: Model
    micro: int
    tokens: int


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operators have made and that are still alive, and their peak.

    `there` are tensors that exist before and stay: they are not counted.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, Tensor):
                self.add(value)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def demo_cases() -> Iterator[Case]:
    """The bundled teacher distilled into itself, short and long; a tiny hybrid."""
    teacher, student = load(demo_teacher()), load(demo_teacher())
    for micro, tokens in ((1, 512), (4, 512), (2, 1024)):
        yield Case("demo", student, teacher, micro, tokens)
    first, second = (random_model("tiny", "cpu", torch.float32, seed=seed) for seed in range(2))
    yield Case("tiny", first, second, 4, 256)


def shaped_case(shape: str, share: float, micro: int, tokens: int, device: str) -> Case:
    """A teacher of random weights and a student with FFN narrowed to a share of its parameters."""
    config = shape_config(shape)
    family, architecture = families.read(config)
    whole = families.parameter_count(architecture, family)
    pattern = str(config["hybrid_override_pattern"])
    width = next(x.width for x in architecture.layers if isinstance(x, FFNLayer))
    cut = dict(config)
    while families.parameter_count(families.read(cut)[1], family) > share * whole:
        if cut["intermediate_size"] > width // 4:
            cut["intermediate_size"] -= 256
        else:  # then whole layers from behind, two at a time: a mixer and its FFN
            pattern = pattern[:-2]
            cut |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    changes = {k: cut[k] for k in ("hybrid_override_pattern", "intermediate_size")}
    student = random_model(shape, device, torch.float32, seed=1, **changes)
    teacher = random_model(
        shape, device, torch.bfloat16 if device == "cuda" else torch.float32, seed=0
    )
    return Case(shape, student, teacher, micro, tokens)


def kept_bytes(case: Case, ids: Tensor) -> int:
    """Bytes of all storages that autograd keeps of the student's forward pass, parameters apart."""
    device = ids.device.type
    parameters = {p.untyped_storage()._cdata for p in case.student.module.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in parameters:
            held[storage] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(device, torch.bfloat16, enabled=device == "cuda"),
    ):
        hidden = final_hidden(case.student.module, ids)
    held[hidden.untyped_storage()._cdata] = hidden
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def measure(case: Case, device: str) -> dict[str, int]:
    """Bytes by item, and the peak of a step of two micro-batches (moments already there)."""
    student, teacher = (m.module.requires_grad_(False) for m in (case.student, case.teacher))
    student.requires_grad_(True)
    blocks = torch.randint(0, case.student.architecture.vocabulary, (8 * case.micro, case.tokens))
    settings = Settings(steps=2, batch=2 * case.micro, micro=case.micro)
    optimizer = make_optimizer(student, settings)
    targets = OnlineTeacher(teacher, blocks)
    train_step(student, targets, blocks, optimizer, settings, 0)
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    found = {
        "student": _bytes(student.parameters()),
        "teacher": _bytes(teacher.parameters()),
        "moments": _bytes(moments),
        "activations": kept_bytes(case, blocks[: case.micro].to(device)),
    }
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        train_step(student, targets, blocks, optimizer, settings, 1)
        found["total"] = torch.cuda.max_memory_allocated()
    else:
        with Counter([*student.parameters(), *teacher.parameters(), *moments]) as counter:
            train_step(student, targets, blocks, optimizer, settings, 1)
        found["total"] = counter.peak + found["student"] + found["teacher"] + found["moments"]
    student.requires_grad_(False)
    return found


def predicted(case: Case, device: str) -> dict[str, int]:
    """What `minipuzzle plan --train` says; autograd's bf16 copies of weights are activations."""
    training = Training(
        micro=case.micro, tokens=case.tokens, engine="gpu" if device == "cuda" else "cpu"
    )
    student, teacher = case.student, case.teacher
    told = training_memory(
        student.architecture, teacher.architecture, student.family, training
    ).to_json()
    told["activations"] += told["computed_copy"]
    return told


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def compare(case: Case, found: Mapping[str, int], told: Mapping[str, int]) -> tuple[Any, float]:
    """Rows for the table, and the error of the total in percent."""
    rows = []
    for item, size in found.items():
        error = 100 * (told[item] - size) / size
        shape = f"{case.micro}x{case.tokens}"
        sizes = [format_bytes(told[item]), format_bytes(size)]
        rows.append([case.name, shape, item, *sizes, f"{error:+.1f}"])
    return rows, abs(error)


def main() -> None:
    """Measure all cases, print them item by item, record the largest error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", help="teacher's shape (random weights) instead of the demo")
    parser.add_argument("--student-share", default="50%")
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.shape:
        share = float(args.student_share.rstrip("%")) / 100
        chosen = [shaped_case(args.shape, share, args.micro, args.tokens, args.device)]
    else:
        chosen = list(demo_cases())
    rows, errors = [], []
    for case in chosen:
        lines, error = compare(case, measure(case, args.device), predicted(case, args.device))
        rows += lines
        errors.append(error)
    print(table(["model", "batch", "item", "planned", "allocated", "error %"], rows))
    name = "plan_memory_error_percent" + ("" if args.shape else "_demo")
    unit = "% of the peak of a training step"
    print(record("distillation", {name: (max(errors), unit)}, folder=args.results))


if __name__ == "__main__":
    main()
