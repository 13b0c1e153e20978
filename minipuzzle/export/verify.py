"""Proof that an exported folder is the student: loaded by plain transformers in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minipuzzle.errors import UserError

TOLERANCE = 1e-3
"""Largest difference of two logits: the student may run on the fast scan, which rounds apart."""
GREEDY_TOKENS = 64
CHILD = Path(__file__).with_name("loader.py")
DROPPED_VARIABLES = ("PYTHONPATH", "PYTHONSTARTUP")


@dataclass(frozen=True)
class Proof:
    """What the loading process reported, and its verdict."""

    max_logit_difference: float
    logits_compared: int
    tokens: tuple[int, ...]
    tokens_agree: int
    parameters: int
    versions: Mapping[str, str]

    @property
    def holds(self) -> bool:
        """Whether the exported folder is the student."""
        return self.max_logit_difference < TOLERANCE and self.tokens_agree == len(self.tokens)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record with the limits beside the figures."""
        return asdict(self) | {"tolerance": TOLERANCE, "dtype": "float32", "holds": self.holds}


@torch.inference_mode()
def reference(module: Any, prompts: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model gives in fp32: logits of prompts (B, T) and greedy tokens after the first one.

    Half a prompt is continued, so that the text before the new tokens is text.
    """
    device = next(module.parameters()).device
    ids = prompts.to(device)
    start = ids[:1, : max(1, ids.shape[1] // 2)]
    written = module.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=GREEDY_TOKENS,
        min_new_tokens=GREEDY_TOKENS,
        do_sample=False,
    )
    logits = module(input_ids=ids, use_cache=False).logits.float()
    tensors = {"ids": ids, "start": start, "logits": logits, "tokens": written[:, start.shape[1] :]}
    return {name: tensor.cpu().clone() for name, tensor in tensors.items()}


def verify(folder: Path, expected: Mapping[str, torch.Tensor]) -> Proof:
    """Load `folder` with plain transformers in a fresh process and compare with `expected`.

    Raises:
        UserError: it does not load, or its logits or greedy tokens are others.
    """
    with tempfile.TemporaryDirectory() as work:
        save_file(dict(expected), Path(work) / "expected.safetensors")
        report = _in_another_process(folder, Path(work))
    proof = Proof(**(report | {"tokens": tuple(report["tokens"])}))
    if not proof.holds:
        raise UserError(
            f"the exported model is not the student: logits differ by up to "
            f"{proof.max_logit_difference:.2g} (limit {TOLERANCE:g}), {proof.tokens_agree} of "
            f"{len(proof.tokens)} greedy tokens agree; please report this with both folders"
        )
    return proof


def _in_another_process(folder: Path, work: Path) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k not in DROPPED_VARIABLES}
    # -I: neither the current folder nor the user's own packages are importable
    command = [sys.executable, "-I", str(CHILD), str(folder.resolve()), str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    report = work / "report.json"
    if done.returncode != 0 or not report.exists():
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"the exported model does not load in plain transformers: {reason}")
    value: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return value
