"""Repeat the accuracy of a finished run on every question its report packages give.

    python scripts/compare_full.py RUN [--models pruned,repaired,student] [--json FILE]

RUN is a run folder with an evaluation (runs/demo). The demo asks few questions to be quick; here
every model answers all of them, and each is compared with the teacher question by question: the
interval is over paired differences.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minipuzzle import model
from minipuzzle.errors import UserError
from minipuzzle.eval.compare import Answers, accuracy, comparison
from minipuzzle.eval.questions import prepare
from minipuzzle.eval.stage import load_for_measuring
from minipuzzle.jsonfile import read_json
from minipuzzle.progress import say, table
from minipuzzle.runfolder import RunFolder, atomic_write_json


def compare_full(run: Path, names: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """Accuracy per model and task, and every model's comparison with the teacher.

    UserError when the run has no evaluation or lacks one of the models.
    """
    folder = RunFolder(run)
    record = read_json(folder.artefact("evaluation") / "evaluation.json")["models"]
    if missing := [name for name in names if name not in record]:
        raise UserError(f"{run} has no model {missing[0]!r}; it has {', '.join(record)}")
    paths = {name: run / record[name]["path"] for name in ["teacher", *names]}
    answers = _answers(folder, paths, limit)
    teacher = answers["teacher"]
    return {
        "schema_version": 1,
        "models": {name: {"tasks": _accuracies(given)} for name, given in answers.items()},
        "against_teacher": {name: comparison(teacher, answers[name]) for name in names},
    }


def _answers(folder: RunFolder, paths: Mapping[str, Path], limit: int | None) -> dict[str, Answers]:
    stage = folder.stage("evaluation")
    assert stage is not None
    inputs = stage["inputs"]
    sources = {split: values["source"] for split, values in inputs["sources"].items()}
    with tempfile.TemporaryDirectory() as work:
        tasks = prepare(
            inputs["settings"]["tasks"],
            sources,
            model.load_tokenizer(paths["teacher"]),
            Path(work) / "tasks",
            limit=limit,
            seed=inputs["seed"],
        )
        answers: dict[str, Answers] = {}
        for name, path in paths.items():
            loaded = load_for_measuring(path)
            answers[name] = tasks.answers(loaded.module, loaded.tokenizer, label=name)
    return answers


def _accuracies(answers: Answers) -> dict[str, dict[str, float]]:
    rows = {task: (*accuracy(given), len(given)) for task, given in answers.items()}
    return {task: {"acc": a, "acc_stderr": e, "n": n} for task, (a, e, n) in rows.items()}


def render(result: Mapping[str, Any]) -> str:
    """The result as a table for each model."""
    parts = []
    teacher = result["models"]["teacher"]["tasks"]
    for name, against in result["against_teacher"].items():
        rows = [
            [
                task,
                str(difference["n"]),
                f"{teacher[task]['acc']:.1%}",
                f"{result['models'][name]['tasks'][task]['acc']:.1%}",
                _interval(difference),
            ]
            for task, difference in against["tasks"].items()
        ]
        rows.append(["mean", str(against["mean"]["n"]), "", "", _interval(against["mean"])])
        kept = against["retained"]
        parts.append(table(["task", "n", "teacher", name, "difference, 95 %"], rows))
        parts.append(
            f"{name} keeps {kept['value']:.2%} of the teacher's mean accuracy "
            f"({kept['low']:.2%} to {kept['high']:.2%})\n"
        )
    return "\n".join(parts)


def _interval(difference: Mapping[str, float]) -> str:
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder with an evaluation")
    parser.add_argument("--models", default="student", help="compared with the teacher: A,B,...")
    parser.add_argument("--limit", type=int, default=None, help="questions per task (default: all)")
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    options = parser.parse_args(arguments)
    try:
        result = compare_full(options.run, options.models.split(","), options.limit)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        atomic_write_json(options.json, result)
    say(render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
