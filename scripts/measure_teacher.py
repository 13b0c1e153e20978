"""Bits per byte of a model folder on installed packages, and whether decoding equals prefill.

    python scripts/measure_teacher.py --json docs/results/teacher.json

Each package gives one drawn sample per window length; "together" is the nats of all of them over
the bytes of all of them.
"""

import argparse
import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipuzzle.data.packages import package_version
from minipuzzle.data.packing import blocks_fingerprint, byte_lengths, token_blocks
from minipuzzle.eval.bpb import BitsPerByte, bits_per_byte
from minipuzzle.model import Model, load

TEACHER = Path(__file__).resolve().parents[1] / "minipuzzle" / "demo" / "teacher"
PACKAGES = ("networkx", "optuna", "sqlalchemy")


@dataclass(frozen=True)
class Sample:
    """How much is read: `tokens` of each source at each of the `windows`, drawn by `seed`."""

    tokens: int
    windows: tuple[int, ...]
    seed: int


def main() -> None:
    """Read the command line, measure, write the JSON whole or not at all."""
    arguments = _arguments()
    sample = Sample(arguments.tokens, tuple(arguments.windows), arguments.seed)
    model = load(arguments.model)
    packages: list[str] = arguments.packages
    decode = {name: decode_gap(model, name, sample.seed) for name in packages}
    print(decode, flush=True)
    result = {
        "what": "bits per byte, windows begun without context; fp32 arithmetic on the CPU",
        "tokens_per_sample": sample.tokens,
        "seed": sample.seed,
        "versions": _versions(packages),
        "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
        "bits_per_byte": {str(w): _scores(model, packages, w, sample) for w in sample.windows},
        "decode": decode,
    }
    _write(arguments.json, result)


def _scores(
    model: Model, packages: list[str], window: int, sample: Sample
) -> dict[str, dict[str, Any]]:
    """Per package: the score, what it was measured on, and a hash of the token ids."""
    lengths = byte_lengths(model.tokenizer, model.architecture.vocabulary)
    found: dict[str, BitsPerByte] = {}
    hashes: dict[str, str] = {}
    for name in packages:
        blocks = _blocks(model, name, window, sample.tokens // window, sample.seed)
        found[name] = bits_per_byte(model.module, blocks, lengths)
        hashes[name] = blocks_fingerprint(blocks)
        print(name, window, round(found[name].value, 5), flush=True)
    together = BitsPerByte(
        sum(part.nats for part in found.values()),
        sum(part.tokens for part in found.values()),
        sum(part.bytes for part in found.values()),
    )
    rows: dict[str, dict[str, Any]] = {
        name: {**_row(part), "blocks": hashes[name]} for name, part in found.items()
    }
    return {**rows, "together": _row(together)}


def _row(found: BitsPerByte) -> dict[str, Any]:
    return {
        "bits_per_byte": round(found.value, 5),
        "nats_per_token": round(found.nats / found.tokens, 5),
        "tokens": found.tokens,
        "bytes": found.bytes,
    }


def _blocks(model: Model, package: str, window: int, blocks: int, seed: int) -> torch.Tensor:
    source = "python-packages:" + package
    return token_blocks(source, model.tokenizer, block=window, blocks=blocks, seed=seed)


@torch.inference_mode()
def decode_gap(model: Model, package: str, seed: int, *, tokens: int = 200) -> dict[str, float]:
    """Largest difference of any logit between one prefill and one token at a time with a cache.

    Args:
        model: the loaded model.
        package: where the one text comes from.
        seed: decides which text.
        tokens: its length.

    Returns:
        The difference, and the largest logit beside which it stands.
    """
    ids = _blocks(model, package, tokens, 1, seed)
    prefill = model.module(input_ids=ids, use_cache=False).logits
    cache, steps = None, []
    for piece in torch.split(ids, 1, dim=1):
        out = model.module(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    gap = (torch.cat(steps, dim=1) - prefill).abs().max()
    return {"tokens": tokens, "gap": float(gap), "largest_logit": float(prefill.abs().max())}


def _versions(packages: list[str]) -> dict[str, str | None]:
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return libraries | {name: package_version(name) for name in packages}


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=TEACHER, help="model folder (default: the demo's teacher)")
    add("--json", type=Path, required=True, help="file to write")
    add("--packages", nargs="+", default=list(PACKAGES), help="installed packages")
    add("--windows", nargs="+", type=int, default=[512, 1024, 2048], help="tokens per window")
    add("--tokens", type=int, default=98_304, help="tokens per source and window length")
    add("--seed", type=int, default=1, help="decides which documents are drawn")
    return parser.parse_args()


if __name__ == "__main__":
    main()
