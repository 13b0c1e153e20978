"""Train the demo's teacher: a small Nemotron-H that has read the sources of Python packages.

    pip install --no-deps --target packages -r scripts/teacher_packages.txt
    PYTHONPATH=packages python scripts/train_demo_teacher.py --out teacher

The defaults are those of the bundled teacher: 700 steps on the first half of the text. One GPU is
used where there is one; a CPU is far slower (try `--shape tiny --steps 20 --batch 2`).
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import teacher_corpus as corpus
import torch
from teacher_model import FastForward, Shape, save_checkpoint
from teacher_training import Log, Settings, bits_per_byte, read_count, read_tokens, train

from minipuzzle.data.packages import STANDARD_LIBRARY

HERE = Path(__file__).resolve().parent

SHAPES = {
    "wide-state": Shape("M-M-M*-M-M-M-M*-M-M-M-M*-", ffn=672, state=128),
    "base": Shape("M-M-M-M*-M-M-M-M*-M-M-M-M*-", ffn=688),
    "wide-heads": Shape("M-M-M-*-M-M-M-M*-M-M-M*-", ffn=704, heads=16, head_dim=32),
    "deep": Shape("M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-", hidden=160, ffn=688),
    "tiny": Shape("M-M*-M-", hidden=64, ffn=96, heads=8, state=16, query_heads=2, kv_heads=1),
}
STEPS = 700
"""Length of the bundled teacher's run."""


def main() -> None:
    """Read the command line; prepare the text unless it is there; train; measure; write."""
    arguments = _arguments()
    out: Path = arguments.out
    data: Path = arguments.data or out.with_name(out.name + ".text")
    shape = dataclasses.replace(SHAPES[arguments.shape], **_changes(arguments, Shape))
    settings = Settings(**_changes(arguments, Settings))
    if not (data / "manifest.json").exists():
        data.mkdir(parents=True, exist_ok=True)
        packages = [STANDARD_LIBRARY, *corpus.read_requirements(arguments.packages)]
        limits = corpus.Limits()
        corpus.prepare(
            data, packages, vocabulary=shape.vocabulary, context=shape.context, limits=limits
        )
    log = Log(out.with_name(out.name + ".jsonl"))
    log(shape=dataclasses.asdict(shape), settings=dataclasses.asdict(settings))
    tokenizer = data / "tokenizer"
    forward = train(
        data,
        shape,
        settings,
        log,
        held_out=corpus.SEARCH_PACKAGES,
        keep=lambda model: save_checkpoint(model, shape, tokenizer, out),
    )
    if arguments.report:
        log(report=_report(forward, data, settings))
    shutil.copy(log.path, out / "training_log.jsonl")
    manifest = json.loads((data / "manifest.json").read_text())
    corpus.write_json(out / "manifest.json", with_read(manifest, settings))


def with_read(manifest: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The text's manifest, and which of its tokens the run could read."""
    count = read_count(manifest["tokens"], settings)
    read = {"first_token": 0, "last_token": count - 1, "tokens": count}
    return {"read": {**read, "of_tokens": manifest["tokens"]}, **manifest}


def _report(forward: FastForward, data: Path, settings: Settings) -> dict[str, Any]:
    """Bits per byte of every unseen package, in windows of 512 and of 2048 tokens."""
    device = forward.head.device
    sizes = torch.from_numpy(np.load(data / "token_bytes.npy")).to(device)
    budget = settings.batch * settings.block
    return {
        name: {
            block: bits_per_byte(
                forward.uncompiled,
                read_tokens(data / f"{name}.bin", device),
                sizes,
                block=block,
                batch=max(1, budget // block // 2),
            )
            for block in (512, 2048)
        }
        for name in corpus.UNSEEN_PACKAGES
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the finished checkpoint")
    add("--data", type=Path, help="prepared text (default: OUT.text, made when missing)")
    packages = HERE / "teacher_packages.txt"
    add("--packages", type=Path, default=packages, help="requirements file of what to read")
    add("--report", action="store_true", help="measure the report packages at the end")
    add("--shape", choices=sorted(SHAPES), default="wide-heads")
    for kind in (Settings, Shape):
        for field in dataclasses.fields(kind):
            words = str(field.type)
            cast = str if "str" in words else float if "float" in words else int
            add(f"--{field.name.replace('_', '-')}", type=cast, help=_describe(field))
    arguments = parser.parse_args()
    if arguments.steps is None and arguments.minutes is None:
        arguments.steps = STEPS
    return arguments


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples."""


def _describe(field: Any) -> str:
    default = "of the shape" if field.default is dataclasses.MISSING else field.default
    return f"(default: {default})"


def _changes(arguments: argparse.Namespace, kind: Any) -> dict[str, Any]:
    named = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)}
    return {name: value for name, value in named.items() if value is not None}


if __name__ == "__main__":
    main()
