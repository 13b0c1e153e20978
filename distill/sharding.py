"""Student and teacher shared out over processes: FSDP2, block by block.

Every process keeps 1 / N of each parameter, and so of its gradient and its moments; a block is
whole only while it computes. Each process trains on its rows of a batch. Gradients are *sums* over
processes: the trainer already weighs a row by its share of the whole batch.

The trainer asks the decoder for hidden states and never calls the model as a whole, so the decoder
is FSDP's root. The head is never called as a module at all: the fused loss wants its matrix, which
`gathered` puts together, and whose gradient goes back to where the rows lie.

Source: PyTorch FSDP2 (`torch.distributed.fsdp.fully_shard`), after ZeRO stage 3 (arXiv 1910.02054).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from minipuzzle.errors import UserError


def shard(module: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """Share the parameters of a causal language model out over the processes of `mesh`, in place.

    Afterwards every parameter is a `DTensor` split along its first dimension; make the optimizer
    then, not before. Without a mesh: all processes of the default group, which must exist.

    Raises:
        UserError: the model has no list of blocks that could be taken apart.
    """
    mesh = mesh or init_device_mesh(_device_type(module), (torch.distributed.get_world_size(),))
    model = cast(Any, module)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    tied = head.weight is embedding.weight
    for block in _blocks(decoder):
        fully_shard(block, mesh=mesh)
    # FSDP's own choice keeps the root whole after a forward pass, and after an evaluation for good.
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True)
    for part in (decoder, *_blocks(decoder)):
        cast(FSDPModule, part).set_gradient_divide_factor(1.0)
        cast(FSDPModule, part).set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    if tied:  # one parameter, kept by the decoder's group; the head only looks at it
        head.weight = embedding.weight
    for name, parameter in list(head.named_parameters(recurse=False)):
        if not isinstance(parameter, DTensor):
            whole = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            head.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))
    return module


def gathered(weight: Tensor) -> Tensor:
    """A parameter whole; the gradients that processes find for it are added up and split again."""
    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial()])


def own_rows(student: nn.Module, rows: Tensor) -> Tensor:
    """This process's rows of a batch: all of them where the student is not sharded.

    Raises:
        UserError: the batch cannot be shared out evenly, and processes would wait for each other.
    """
    mesh = mesh_of(student)
    if mesh is None:
        return rows
    if len(rows) % mesh.size():
        raise UserError(
            f"distill.batch of {len(rows)} cannot be shared by {mesh.size()} processes; "
            f"choose a multiple of their number"
        )
    return rows[mesh.get_local_rank() :: mesh.size()]


def summed(student: nn.Module, value: float) -> float:
    """The sum over processes of what each found; the value itself without sharding."""
    mesh = mesh_of(student)
    if mesh is None:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=mesh.device_type)
    torch.distributed.all_reduce(total, group=mesh.get_group())
    return total.item()


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """The processes that share a module's parameters; None where each is whole."""
    shares = (p.device_mesh for p in module.parameters() if isinstance(p, DTensor))
    return next(shares, None)


def _blocks(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's layers: the one list of modules in it."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    if len(lists) != 1:
        raise UserError(f"{type(decoder).__name__} has no single list of blocks to shard")
    return list(lists[0])


def _device_type(module: nn.Module) -> str:
    return next(module.parameters()).device.type
