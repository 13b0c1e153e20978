"""A byte-level tokenizer, a text and a run folder for tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from tests.tiny import write_tiny

END, PAD = "<|endoftext|>", "<|pad|>"
MERGES = [("r", "e"), ("t", "u"), ("re", "tu"), ("retu", "r"), ("retur", "n"), ("Ġ", "x")]
LINES = ["def f(x):", "    return x + 1", "for name in names:", "    print(name)", "", "x = [1, 2]"]
TEXT = "\n".join(LINES[i * i % len(LINES)] + f"  # {i}" for i in range(400))


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE of 264 tokens with end and pad; returns its size."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [END, PAD, *letters, *("".join(pair) for pair in MERGES)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, PAD])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "bos_token": END,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


def write_model(folder: Path, **changes: Any) -> Path:
    """A tiny model with a tokenizer that covers its vocabulary."""
    write_tiny(folder, **{"vocab_size": 264, **changes})
    assert write_tokenizer(folder) == 264
    return folder


def tiny_run(
    place: Path, *, tasks: tuple[str, ...] = (), **changes: Any
) -> tuple[Recipe, RunFolder]:
    """A recipe and a run folder with a teacher of seven layers and a student of five."""
    teacher = write_model(place / "teacher")
    texts = {}
    for name in ("calibration", "distillation", "search", "report"):
        text = place / f"{name}.txt"
        text.write_text(f"# {name}\n{TEXT}")
        texts[name] = {"source": str(text), "block": 32}
    settings = {
        "blocks": 4,
        "tasks": tasks,
        "speed": {"prompt": 8, "tokens": 3, "repeats": 2},
    }
    recipe = Recipe.from_mapping(
        {"model": str(teacher), "data": texts, "eval": settings, **changes}
    )
    folder = RunFolder(place / "run")

    def body(work: Path) -> None:
        made = write_model(place / "made", seed=1, hybrid_override_pattern="M-M*-")
        for file in made.iterdir():
            file.rename(work / file.name)

    folder.run_stage("distill", "student", {}, body)
    return recipe, folder
