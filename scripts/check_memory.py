"""Predicted memory against tensors that a real `generate` leaves behind.

    python scripts/check_memory.py
    python scripts/check_memory.py --device cuda --results results

For each case a stock model generates greedily from a prompt, and the bytes of the storages of its
parameters (embedding and head apart from the rest), of the keys and values, of the recurrent and of
the convolution states in its cache are held against `memory()` at the same context and batch, in
the precisions that those tensors turn out to have. The error recorded is the largest of any item
and of any total, in percent of what was allocated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from figures import RESULTS, record
from random_model import shape_config
from torch import Tensor, nn

from minipuzzle import families
from minipuzzle.architecture import Architecture
from minipuzzle.decoding import Pool, stock_model
from minipuzzle.families import Family
from minipuzzle.memory import Deployment, memory
from minipuzzle.model import load, read_architecture
from minipuzzle.plan import with_width, without
from minipuzzle.progress import table
from minipuzzle.source import demo_teacher

NEW_TOKENS = 6
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 192,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
ITEMS = ("weights", "embeddings", "kv_cache", "ssm_state", "conv_state")
PRECISION_OF = {"kv_cache": "kv", "ssm_state": "state", "conv_state": "conv"}


@dataclass(frozen=True)
class Case:
    """A model that generates: its shape, and a prompt of `tokens` for each of `batch` sequences."""

    name: str
    family: Family
    architecture: Architecture
    module: nn.Module
    batch: int
    tokens: int


def cases(device: torch.device) -> Iterator[Case]:
    """The demo's teacher and cuts of it, a tiny Nemotron-H and a tiny Llama; short and long."""
    for batch, tokens in ((1, 5), (3, 64)):
        teacher = load(demo_teacher(), device=str(device))
        yield Case("demo", teacher.family, teacher.architecture, teacher.module, batch, tokens)
    config, _, whole = read_architecture(demo_teacher())
    cut = with_width(without(without(whole, "ffn", 3), "attention", 1), 352)
    shapes = (
        ("demo, cut", config, cut),
        ("tiny Nemotron-H", shape_config("tiny"), None),
        ("tiny Llama, tied", LLAMA, None),
        ("tiny Llama, own head", LLAMA | {"tie_word_embeddings": False}, None),
    )
    for dtype in PRECISIONS:
        pool = Pool(device, dtype)
        for name, shape, changed in shapes:
            family, read = families.read(shape)
            architecture = changed or read
            module = stock_model(architecture, family, shape, pool)
            for batch, tokens in ((1, 17), (3, 130)):
                yield Case(name, family, architecture, module, batch, tokens)


def allocated(case: Case, device: torch.device) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes by item after `generate`, and the precision of each item's tensors."""
    ids = torch.randint(0, case.architecture.vocabulary, (case.batch, case.tokens), device=device)
    stock: Any = case.module
    out = stock.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    held: dict[str, list[Tensor]] = {item: [] for item in ITEMS}
    outside = {
        case.family.memory_name(spec.name): spec.role
        for spec in case.family.tensors(case.architecture)
        if spec.role in ("embedding", "head")
    }
    for name, parameter in case.module.named_parameters():
        held["embeddings" if name in outside else "weights"].append(parameter.data)
    for layer in out.past_key_values.layers:
        for name, value in vars(layer).items():
            item = _item(name)
            if item is not None:
                held[item] += _tensors(value)
    sizes = {item: _storage_bytes(tensors) for item, tensors in held.items()}
    precisions = {item: PRECISIONS[tensors[0].dtype] for item, tensors in held.items() if tensors}
    return sizes, precisions


def _item(name: str) -> str | None:
    """The item that an attribute of a cache's layer belongs to."""
    if name in ("keys", "values"):
        return "kv_cache"
    return {"conv_states": "conv_state", "recurrent_states": "ssm_state"}.get(name)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def predicted(case: Case, precisions: Mapping[str, str]) -> dict[str, int]:
    """What `memory` says for the tokens in the cache: all but the last that was generated."""
    at = Deployment(context=case.tokens + NEW_TOKENS - 1, batch=case.batch)
    named: dict[str, Any] = {
        PRECISION_OF.get(item, item): bits for item, bits in precisions.items()
    }
    need = memory(case.architecture, case.family, replace(at, **named)).to_json()
    return {item: need[item] for item in ITEMS}


def error_percent(told: Mapping[str, int], found: Mapping[str, int]) -> float:
    """The largest relative difference of an item, or of the total, in percent."""
    pairs = [(told[item], found[item]) for item in ITEMS]
    pairs.append((sum(told.values()), sum(found.values())))
    return max(100 * abs(a - b) / b if b else 100.0 * (a != b) for a, b in pairs)


@torch.inference_mode()
def main() -> None:
    """Compare all cases, print them, record the largest error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    rows, errors = [], []
    for case in cases(device):
        found, precisions = allocated(case, device)
        told = predicted(case, precisions)
        errors.append(error_percent(told, found))
        kind = f"{precisions['weights']}/{precisions.get('ssm_state', '-')}"
        numbers = [f"{found[item]:,}" for item in ITEMS[2:]]
        rows.append([case.name, kind, f"{case.batch}x{case.tokens}", *numbers, f"{errors[-1]:.2f}"])
    print(table(["model", "weights/state", "prompt", "kv", "ssm", "conv", "error %"], rows))
    figures = {
        "memory_model_error_percent": (max(errors), "% of an item or total"),
        "memory_model_cases": (len(errors), "models x prompts x dtypes"),
    }
    print(record("search", figures, folder=args.results))


if __name__ == "__main__":
    main()
