"""Training memory against what autograd keeps and what the trainer allocates, and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from minipuzzle import families
from minipuzzle.architecture import Kind
from minipuzzle.cli.plan import command
from minipuzzle.distill.loss import DEFAULT_CHUNK
from minipuzzle.fastscan import install
from minipuzzle.memory import layer_parameters
from minipuzzle.model import transformers_config
from minipuzzle.training_memory import (
    LOSS_CHUNK,
    Training,
    activation_bytes,
    block_parameters,
    kept_bytes_per_token,
    largest_micro,
    training_memory,
)

from .tiny import CONFIG

SIZES = {"hidden_size": 64, "mamba_num_heads": 16, "intermediate_size": 256, "head_dim": 16}
FAMILY, SHAPE = families.read(CONFIG | SIZES)
CPU = Training(micro=2, tokens=64, engine="cpu")


def kept(layer: int) -> int:
    """Bytes of the storages that autograd keeps of one block of a stock model."""
    from transformers import AutoModelForCausalLM

    stock = transformers_config(FAMILY, CONFIG | SIZES, SHAPE)
    module = AutoModelForCausalLM.from_config(stock).eval()
    install(module)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    stream = torch.randn(CPU.micro, CPU.tokens, SHAPE.hidden, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module.get_submodule(FAMILY.layer_module(layer))(stream)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("kind", ["mamba", "attention", "ffn"])
def test_kept_activations_are_autograds(kind: Kind) -> None:
    layer = SHAPE.indices(kind)[0]
    told = CPU.micro * CPU.tokens * kept_bytes_per_token(SHAPE.layers[layer], SHAPE.hidden, "cpu")
    # Beyond it: the last state of a scan, the convolution's taps.
    assert told == pytest.approx(kept(layer), rel=0.08 if kind == "mamba" else 1e-3)


def test_shares_add_up_and_what_is_gathered_comes_on_top() -> None:
    one = training_memory(SHAPE, SHAPE, FAMILY, Training())
    four = training_memory(SHAPE, SHAPE, FAMILY, Training(processes=4))
    for item in ("student", "gradients", "moments", "teacher"):
        assert getattr(one, item) <= 4 * getattr(four, item) < getattr(one, item) + 64
    assert one.unsharded == 0 and four.unsharded > 0
    assert four.activations == one.activations


def test_bf16_master_halves_weights_and_needs_no_copy() -> None:
    fp32, bf16 = (
        training_memory(SHAPE, SHAPE, FAMILY, Training(master=name)) for name in ("fp32", "bf16")
    )
    assert 2 * bf16.student == fp32.student and 2 * bf16.moments == fp32.moments
    assert fp32.computed_copy > 0 == bf16.computed_copy


def test_checkpointing_and_offload_need_less() -> None:
    plain = Training(tokens=512)
    checkpointed = replace(plain, checkpointing=True)
    assert activation_bytes(SHAPE, checkpointed) < activation_bytes(SHAPE, plain) / 2
    offloaded = training_memory(SHAPE, SHAPE, FAMILY, replace(plain, teacher_offload=True))
    assert offloaded.teacher < training_memory(SHAPE, SHAPE, FAMILY, plain).teacher


def test_largest_micro_is_the_last_that_fits() -> None:
    at = [
        training_memory(SHAPE, SHAPE, FAMILY, replace(CPU, micro=micro)).total
        for micro in range(9)
        if micro
    ]
    for micro, total in enumerate(at[:-1], start=1):
        assert largest_micro(SHAPE, SHAPE, FAMILY, CPU, total) == micro
        assert largest_micro(SHAPE, SHAPE, FAMILY, CPU, total - 1) == micro - 1


def test_sizes_are_those_of_the_model_and_the_loss() -> None:
    assert LOSS_CHUNK == DEFAULT_CHUNK
    outside = layer_parameters(SHAPE, FAMILY) - sum(block_parameters(SHAPE, FAMILY))
    assert outside == SHAPE.hidden  # the final norm


def test_command() -> None:
    arguments = ["demo", "--train", "--student", "83%", "--memory", "1GiB", "--tokens", "512"]
    told = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert told.exit_code == 0 and max(map(len, told.output.splitlines())) <= 80
    assert "is the largest that fits" in told.output
    record = json.loads(CliRunner().invoke(command, [*arguments, "--json"]).output)
    items = record["memory_bytes"]
    assert items.pop("total") == sum(items.values())
    assert record["parameters"]["student"] <= 0.83 * record["parameters"]["teacher"]
    small = CliRunner().invoke(command, [*arguments, "--memory", "64MiB"])
    assert "not one fits" in small.output and "not enough alone" in small.output
