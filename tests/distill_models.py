"""Tiny teachers and students in memory, and a program that trains one (to be killed)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minipuzzle import families
from minipuzzle.distill.config import Settings
from minipuzzle.distill.trainer import train
from minipuzzle.model import transformers_config
from tests.tiny import CONFIG

SETTINGS = Settings(steps=12, batch=3, learning_rate=3e-3, warmup=0.2, checkpoint_every=3, seed=5)


def tiny(seed: int, *, tied: bool = False) -> nn.Module:
    """A random model of the tests' family; same seed, same bits."""
    from transformers import AutoModelForCausalLM

    config = CONFIG | {"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4}
    family, architecture = families.read(config)
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(transformers_config(family, config, architecture))
    if tied:  # by hand: the stock class does not
        module.get_output_embeddings().weight = module.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)  # as drawn the logits are so small that all models agree
    evaluated: nn.Module = module.eval().requires_grad_(False)
    return evaluated


def blocks(count: int = 7, length: int = 24, seed: int = 1) -> Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, int(CONFIG["vocab_size"]), (count, length), generator=generator)


def bits(module: nn.Module) -> dict[str, Tensor]:
    """All parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Every tensor equal in every bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def main(work: Path, pause: float) -> None:
    """Train in `work`, saying so after each step; the pause lets a kill hit any of them."""

    def tell(entry: object) -> None:
        print(entry, flush=True)
        time.sleep(pause)

    student = run(work, tell)
    save_file(student, work / "student.safetensors")


def run(work: Path, on_step: Callable[[Any], None] | None = None) -> dict[str, Tensor]:
    """The training that is killed; the student's parameters after it."""
    student = tiny(2)
    train(student, tiny(1), blocks(), SETTINGS, work=work, on_step=on_step, held_out=blocks(seed=9))
    return bits(student)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
