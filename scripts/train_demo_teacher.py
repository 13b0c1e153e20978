r"""Train the demo's teacher: a small Nemotron-H that has read the sources of Python packages.

    pip install --no-deps --target packages -r scripts/teacher_packages.txt
    PYTHONPATH=packages python scripts/train_demo_teacher.py --out teacher

The defaults are those of the bundled teacher: 700 steps on the first half of the text. One GPU is
used where there is one; a CPU is far slower (try `--shape tiny --steps 20 --batch 2`).

The two models of the ablations on a GPU, a hybrid of 27 M parameters and a Llama of 8 M, read
whatever packages are installed, and the bundled tokenizer. The first command prepares the text for
both; no network is needed:

    python scripts/train_demo_teacher.py --shape large --out runs/large --data runs/text \
        --packages installed --tokenizer minipuzzle/demo/teacher
    python scripts/train_demo_teacher.py --shape llama --out runs/llama --data runs/text

`optuna` or `mpmath` must be installed, on which runs are measured (bits per byte); these and
`networkx` and `sqlalchemy` are never read. `--minutes` ends a run by the clock, its schedule too.
On one H200 with 16 cores and 184 packages (337 MB, 109 M tokens) the text took 18 seconds, the
Llama trained at 2.4 M tokens/s (46 M tokens in 19 seconds after 15 of compilation), the hybrid at
586,000 (compilation 31 seconds, 32 GiB); its 100 M tokens take 171 seconds at that speed.
"""

import argparse
import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import teacher_corpus as corpus
import torch
from teacher_forward import AnyShape, FastForward, save_checkpoint
from teacher_llama import LlamaShape
from teacher_model import Shape
from teacher_tokenizer import write_json
from teacher_training import Log, Settings, bits_per_byte, read_count, read_tokens, train

from minipuzzle.data.packages import STANDARD_LIBRARY

HERE = Path(__file__).resolve().parent

INSTALLED = "installed"
SHAPES: dict[str, Shape | LlamaShape] = {
    "wide-state": Shape("M-M-M*-M-M-M-M*-M-M-M-M*-", ffn=672, state=128),
    "base": Shape("M-M-M-M*-M-M-M-M*-M-M-M-M*-", ffn=688),
    "wide-heads": Shape("M-M-M-*-M-M-M-M*-M-M-M*-", ffn=704, heads=16, head_dim=32),
    "deep": Shape("M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-", hidden=160, ffn=688),
    "tiny": Shape("M-M*-M-", hidden=64, ffn=96, heads=8, state=16, query_heads=2, kv_heads=1),
    "large": Shape(
        "M-M-M-M*-M-M-M-M*-M-M-M*-",
        hidden=352,
        ffn=1296,
        heads=32,
        head_dim=32,
        query_heads=12,
        kv_heads=4,
    ),
    "llama": LlamaShape(),
    "tiny-llama": LlamaShape(blocks=2, hidden=64, ffn=96, query_heads=2, kv_heads=1),
}
STEPS = 700
"""Length of the bundled teacher's run."""
SETTINGS = {
    "large": Settings(steps=1526, text_share=1),
    "llama": Settings(steps=STEPS, rate=0.02, text_share=1),
}
"""Settings of a shape where they are not those of the bundled teacher.

`large` was tried for 24 seconds (14 M tokens) at 0.02 and 0.032: 1.247 and 1.134 bits per byte on
optuna, 1.865 and 1.746 on mpmath. `llama` was tried at this rate only.
"""
PACKAGE_MB = {INSTALLED: 40.0}
"""Text of one package at most, where few packages must do."""


def main() -> None:
    """Read the command line; prepare the text unless it is there; train; measure; write."""
    parser = _parser()
    arguments = parser.parse_args()
    out: Path = arguments.out
    data: Path = arguments.data or out.with_name(out.name + ".text")
    preset = SHAPES[arguments.shape]
    for name in _strange(arguments, preset):
        parser.error(f"--{name} is no size of --shape {arguments.shape}")
    shape = dataclasses.replace(preset, **_changes(arguments, type(preset)))
    settings = _settings(arguments)
    if not (data / "manifest.json").exists():
        _prepare(data, shape, arguments)
    log = Log(out.with_name(out.name + ".jsonl"))
    log(shape=dataclasses.asdict(shape), settings=dataclasses.asdict(settings))
    shard = int(arguments.max_shard_mb * 1e6)
    forward = train(
        data,
        shape,
        settings,
        log,
        held_out=[name for name in corpus.SEARCH_PACKAGES if (data / f"{name}.bin").exists()],
        keep=lambda model: save_checkpoint(
            model, shape, data / "tokenizer", out, max_shard_bytes=shard
        ),
    )
    if arguments.report:
        log(report=_report(forward, data, settings))
    shutil.copy(log.path, out / "training_log.jsonl")
    manifest = json.loads((data / "manifest.json").read_text())
    write_json(out / "manifest.json", with_read(manifest, settings))


def _prepare(data: Path, shape: AnyShape, arguments: argparse.Namespace) -> None:
    """Write the text's tokens to `data`; say how long it took."""
    started = time.monotonic()
    data.mkdir(parents=True, exist_ok=True)
    source = arguments.packages
    if source == INSTALLED:
        packages = corpus.installed_packages()
    else:
        packages = [STANDARD_LIBRARY, *corpus.read_requirements(Path(source))]
    megabytes = arguments.package_mb or PACKAGE_MB.get(source, 8.0)
    manifest = corpus.prepare(
        data,
        packages,
        vocabulary=shape.vocabulary,
        context=shape.context,
        limits=corpus.Limits(package_bytes=int(megabytes * 1e6)),
        tokenizer=arguments.tokenizer,
        processes=arguments.processes,
    )
    amounts = {name: manifest[name] for name in ("files", "bytes", "tokens")}
    print(json.dumps({"text_seconds": round(time.monotonic() - started, 1), **amounts}), flush=True)


def _settings(arguments: argparse.Namespace) -> Settings:
    """Settings of the shape with those of the command line; `--minutes` alone sets no steps."""
    preset = SETTINGS.get(arguments.shape, Settings(steps=STEPS))
    if arguments.minutes is not None:
        preset = dataclasses.replace(preset, steps=None)
    return dataclasses.replace(preset, **_changes(arguments, Settings))


def with_read(manifest: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The text's manifest, and which of its tokens the run could read."""
    count = read_count(manifest["tokens"], settings)
    read = {"first_token": 0, "last_token": count - 1, "tokens": count}
    return {"read": {**read, "of_tokens": manifest["tokens"]}, **manifest}


def _report(forward: FastForward, data: Path, settings: Settings) -> dict[str, Any]:
    """Bits per byte of every unseen package, in windows of 512 and of 2048 tokens."""
    device = forward.route.head.device
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
        if (data / f"{name}.bin").exists()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the finished checkpoint")
    add("--data", type=Path, help="prepared text (default: OUT.text, made when missing)")
    words = f"requirements file of what to read, or `{INSTALLED}` for all that is installed here"
    add("--packages", default=str(HERE / "teacher_packages.txt"), help=words)
    add("--package-mb", type=float, help="text of one package at most (default: 8, installed: 40)")
    add("--tokenizer", type=Path, help="model folder whose tokenizer is taken (default: a new one)")
    cores = os.cpu_count() or 1
    add("--processes", type=int, default=cores, help="processes that prepare the text")
    add("--max-shard-mb", type=float, default=4000.0, help="size of a file of weights at most")
    add("--report", action="store_true", help="measure the report packages at the end")
    add("--shape", choices=sorted(SHAPES), default="wide-heads")
    for name, (cast, words) in _fields().items():
        add(f"--{name.replace('_', '-')}", type=cast, help=words)
    return parser


def _fields() -> dict[str, tuple[Any, str]]:
    """Type and help of every setting and size that the command line can change."""
    found: dict[str, tuple[Any, str]] = {}
    for kind in (Settings, Shape, LlamaShape):
        for field in dataclasses.fields(kind):
            words = str(field.type)
            cast = str if "str" in words else float if "float" in words else int
            default = field.default if kind is Settings else "of the shape"
            found.setdefault(field.name, (cast, f"(default: {default})"))
    return found


def _changes(arguments: argparse.Namespace, kind: Any) -> dict[str, Any]:
    named = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)}
    return {name: value for name, value in named.items() if value is not None}


def _strange(arguments: argparse.Namespace, shape: AnyShape) -> list[str]:
    """Sizes on the command line that the shape's family does not have."""
    other = LlamaShape if isinstance(shape, Shape) else Shape
    return sorted(_changes(arguments, other).keys() - _changes(arguments, type(shape)).keys())


if __name__ == "__main__":
    main()
