"""Bits per byte of a model folder on installed packages, and whether decoding equals prefill.

    python scripts/measure_teacher.py --json docs/results/teacher.json

Each package, and all of `--together` as one source, gives one drawn sample per window length.
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
from minipuzzle.eval.bpb import bits_per_byte
from minipuzzle.model import Model, load

TEACHER = Path(__file__).resolve().parents[1] / "minipuzzle" / "demo" / "teacher"
PACKAGES = ("networkx", "sqlalchemy", "optuna", "mpmath")
TOGETHER = ("networkx", "optuna", "sqlalchemy")


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
    result = {
        "what": "bits per byte, windows begun without context; fp32 arithmetic on the CPU",
        "tokens_per_sample": sample.tokens,
        "seed": sample.seed,
        "versions": _versions(arguments.packages, arguments.together),
        "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
        "bits_per_byte": {
            ",".join(source): _scores(model, source, sample)
            for source in [*([name] for name in arguments.packages), arguments.together]
        },
        "decode": {name: decode_gap(model, name, sample.seed) for name in arguments.packages},
    }
    _write(arguments.json, result)


def _scores(model: Model, packages: list[str], sample: Sample) -> dict[str, dict[str, Any]]:
    """Per window length: the score, what it was measured on, and a hash of the token ids."""
    scores: dict[str, dict[str, Any]] = {}
    for window in sample.windows:
        blocks = _blocks(model, packages, window, sample.tokens // window, sample.seed)
        lengths = byte_lengths(model.tokenizer, model.architecture.vocabulary)
        found = bits_per_byte(model.module, blocks, lengths)
        scores[str(window)] = {
            "bits_per_byte": round(found.value, 5),
            "nats_per_token": round(found.nats / found.tokens, 5),
            "tokens": found.tokens,
            "bytes": found.bytes,
            "blocks": blocks_fingerprint(blocks),
        }
        print(",".join(packages), window, scores[str(window)]["bits_per_byte"], flush=True)
    return scores


def _blocks(model: Model, packages: list[str], window: int, blocks: int, seed: int) -> torch.Tensor:
    source = "python-packages:" + ",".join(packages)
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
    ids = _blocks(model, [package], tokens, 1, seed)
    prefill = model.module(input_ids=ids, use_cache=False).logits
    cache, steps = None, []
    for piece in torch.split(ids, 1, dim=1):
        out = model.module(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    gap = (torch.cat(steps, dim=1) - prefill).abs().max()
    return {"tokens": tokens, "gap": float(gap), "largest_logit": float(prefill.abs().max())}


def _versions(*names: list[str]) -> dict[str, str | None]:
    packages = sorted({name for group in names for name in group})
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
    add("--packages", nargs="+", default=list(PACKAGES), help="measured one by one")
    add("--together", nargs="+", default=list(TOGETHER), help="measured as one source")
    add("--windows", nargs="+", type=int, default=[512, 1024, 2048], help="tokens per window")
    add("--tokens", type=int, default=98_304, help="tokens per source and window length")
    add("--seed", type=int, default=1, help="decides which documents are drawn")
    return parser.parse_args()


if __name__ == "__main__":
    main()
