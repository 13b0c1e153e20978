"""What the cut costs and what repair gives back, by choice of channels, tokens and ridge.

Everything is measured on the search split of a recipe: nothing here looks at the report split.

    python scripts/ablate_repair.py --recipe minipuzzle/demo/demo.yaml --json OUT.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minipuzzle.architecture import Architecture
from minipuzzle.data.blocks import recipe_blocks
from minipuzzle.distill.heldout import evaluate
from minipuzzle.distill.teacher import OnlineTeacher
from minipuzzle.model import Model, load
from minipuzzle.prune.repair import repair
from minipuzzle.prune.score import score
from minipuzzle.prune.select import least_important, top_units
from minipuzzle.prune.slice import slice_checkpoint
from minipuzzle.recipe import Recipe
from minipuzzle.scores import Scores
from minipuzzle.selection import LayerSelection, Selection
from minipuzzle.source import resolve


@dataclass(frozen=True)
class Trial:
    """One setting: FFN layers removed, FFN width, how channels are chosen, tokens and ridge."""

    ffn_removed: int
    width: int
    channels: str
    blocks: int
    ridge: float


@dataclass(frozen=True)
class Bench:
    """The teacher, its scores, and the texts everything is measured on."""

    teacher: Model
    scores: Scores
    calibration: torch.Tensor
    search: torch.Tensor

    def measure(self, trial: Trial) -> dict[str, float | int | str]:
        """Loss and KL on the search text after the cut and after the repair."""
        selection = choose(self.scores, self.teacher.architecture, trial)
        judge = OnlineTeacher(self.teacher.module, self.search)
        with tempfile.TemporaryDirectory() as folder:
            slice_checkpoint(self.teacher.folder, Path(folder) / "cut", selection)
            student = load(Path(folder) / "cut")
        cut = evaluate(student.module, judge, self.search)
        started = time.monotonic()
        ids = self.calibration[: trial.blocks]
        repair(self.teacher, student, selection, ids, ridge=trial.ridge)
        seconds = time.monotonic() - started
        after = evaluate(student.module, judge, self.search)
        return {
            **asdict(trial),
            "tokens": ids.numel(),
            "kl_cut": cut.kl,
            "loss_cut": cut.loss,
            "kl_repaired": after.kl,
            "loss_repaired": after.loss,
            "seconds": round(seconds, 1),
        }

    def teacher_loss(self) -> float:
        """Next-token loss of the teacher on the search text, nats."""
        judge = OnlineTeacher(self.teacher.module, self.search)
        return evaluate(self.teacher.module, judge, self.search).loss


def choose(scores: Scores, architecture: Architecture, trial: Trial) -> Selection:
    """The cut of a trial: lowest FFN layers out, the best channels by one metric kept."""
    gone = least_important(scores, "ffn", trial.ffn_removed)
    layers: list[LayerSelection | None] = []
    for i, layer in enumerate(architecture.layers):
        if i in gone:
            layers.append(None)
        elif layer.kind == "ffn":
            values = scores.units[i, "width", trial.channels]
            layers.append({"width": top_units(values, trial.width)})
        else:
            layers.append({})
    return Selection(layers=tuple(layers))


def trials(removed: int, width: int) -> list[Trial]:
    """One factor at a time around the default."""
    base = {"ffn_removed": removed, "width": width}
    return [
        *(Trial(**base, channels=c, blocks=48, ridge=1e-3) for c in ("activation", "energy")),
        *(Trial(**base, channels="surgeon", blocks=b, ridge=1e-3) for b in (16, 48, 128)),
        *(Trial(**base, channels="surgeon", blocks=48, ridge=r) for r in (1e-4, 1e-2)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the ablation and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--model", help="another model than the recipe's")
    parser.add_argument("--removed", type=int, default=2, help="FFN layers removed")
    parser.add_argument("--width", type=int, default=416, help="FFN width kept")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    recipe = Recipe.load(options.recipe, [f"model={options.model}"] if options.model else [])
    teacher = load(resolve(recipe.model, recipe.revision))
    calibration = recipe_blocks(recipe, "calibration", teacher.tokenizer, 128)
    search = recipe_blocks(recipe, "search", teacher.tokenizer, recipe.search.blocks)
    scores = score(teacher, calibration[:32], {}, layer_sequences=recipe.score.blocks)
    bench = Bench(teacher, scores, calibration, search)
    rows = []
    for trial in trials(options.removed, options.width):
        rows.append(bench.measure(trial))
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "teacher_loss": bench.teacher_loss(),
        "search_tokens": search.numel(),
        "score_tokens": calibration[:32].numel(),
        "trials": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
