"""The stage: copy the student's tensors, write what goes around them, prove that it loads."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from minipuzzle import model
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.files import atomic_write_json, atomic_write_text, require_disk
from minipuzzle.jsonfile import read_json
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from minipuzzle.source import resolve
from minipuzzle.writer import carry_files

from .card import model_card
from .verify import Proof, reference, verify

SCHEMA_VERSION = 1
SUMS, CARD, PROOF = "SHA256SUMS", "README.md", "verified.json"
GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def run(recipe: Recipe, folder: RunFolder) -> Path:
    """See `minipuzzle.export.run`."""
    student = folder.artefact("student")
    teacher = resolve(recipe.model, recipe.revision)
    evaluated = folder.stage("evaluation") is not None
    inputs = {
        "schema_version": SCHEMA_VERSION,
        "teacher": Checkpoint.open(teacher).fingerprint(),
        "student": folder.fingerprint("student"),
        "evaluation": folder.fingerprint("evaluation") if evaluated else None,
        "recipe": recipe.to_mapping(),
    }

    def body(work: Path) -> None:
        write_model(student, work)
        evaluation = read_json(folder.path / "evaluation/evaluation.json") if evaluated else None
        card = model_card(recipe, teacher=teacher, student=student, evaluation=evaluation)
        atomic_write_text(work / CARD, card)
        proof = prove(recipe, student, work)
        atomic_write_json(work / PROOF, proof.to_json())
        atomic_write_text(work / SUMS, checksums(work))

    return folder.run_stage("export", "export", inputs, body)


def write_model(source: Path, target: Path) -> None:
    """Copy a model folder's weights as they are; write its configuration afresh.

    Only files that are part of a model are taken: safetensors and their index, tokenizer, chat
    template, generation config. UserError when the disk has too little room or `source` is not a
    whole checkpoint.
    """
    config, family, architecture, checkpoint = model.open_checked(source)
    require_disk(target, checkpoint.total_bytes)
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, target / path.name)
    _write_json(target / "config.json", family.write_config(config, architecture))
    carry_files(source, target)
    if not (target / "generation_config.json").exists():
        ids = {key: config[key] for key in GENERATION_KEYS if config.get(key) is not None}
        _write_json(target / "generation_config.json", ids)


def prove(recipe: Recipe, student: Path, exported: Path) -> Proof:
    """Hold the exported folder, loaded elsewhere, against the run's own student."""
    loaded = model.load(student, device="cuda" if torch.cuda.is_available() else "cpu")
    prompts = recipe_blocks(recipe, "calibration", loaded.tokenizer, 1)
    return verify(exported, reference(loaded.module, prompts))


def checksums(folder: Path) -> str:
    """Lines for `sha256sum --check` over every visible file of the folder but the list itself."""
    paths = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return "".join(f"{_sha256(path)}  {path.name}\n" for path in paths if path.name != SUMS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
