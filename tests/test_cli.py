"""The command line: light, one line for what the user can put right, a traceback for our bugs."""

from __future__ import annotations

import errno
import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minipuzzle import pipeline
from minipuzzle.cli import COMMANDS, main
from minipuzzle.errors import UserError
from minipuzzle.files import atomic_write_json
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder

from .tiny import CONFIG

Run = Callable[[Recipe, RunFolder], None]
MEASURED = {
    "parameters": 1000,
    "memory_bytes": 2000,
    "memory": {"weights": 2000},
    "bits_per_byte": 0.9,
    "bits_per_byte_tokens": 10,
    "tasks": {
        "scope": {"acc": 0.8, "acc_stderr": 0.02, "n": 100},
        "bracket": {"acc": 0.9, "acc_stderr": 0.01, "n": 100},
    },
    "decode_tokens_per_second": 50.0,
    "prefill_tokens_per_second": 500.0,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a model that has only its config.json."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "my.yaml").write_text("model: model\nbudget: 90%\n")
    return tmp_path


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that write a file from their setting; the list fills with the names of those run."""
    log: list[str] = []

    def stage(name: str, artefact: str) -> Run:
        def body(recipe: Recipe, work: Path) -> None:
            log.append(name)
            (work / "out.txt").write_text(f"{name} {recipe.seed}")
            if name == "eval":
                models = {model: {**MEASURED, "path": f"../{model}"} for model in pipeline.MODELS}
                atomic_write_json(work / "evaluation.json", {"models": models})

        def run(recipe: Recipe, folder: RunFolder) -> None:
            folder.run_stage(name, artefact, {"seed": recipe.seed}, lambda work: body(recipe, work))

        return run

    for entry in pipeline.STAGES:
        fake = types.ModuleType(entry.module)
        fake.run = stage(entry.name, entry.artefact)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, entry.module, fake)
    return log


def replace_stage(monkeypatch: pytest.MonkeyPatch, name: str, run: Run) -> None:
    (entry,) = (stage for stage in pipeline.STAGES if stage.name == name)
    fake = types.ModuleType(entry.module)
    fake.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, entry.module, fake)


ORDER = ["score", "search", "prune", "repair", "distill", "eval", "export", "report"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["plan", "--help"], ["run", "-h"]]
)
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom minipuzzle.cli import main\n"
        f"code = main({arguments!r})\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'rich', 'yaml'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY [] 0"


def test_plan_loads_no_torch(here: Path) -> None:
    code = (
        "import sys\nfrom minipuzzle.cli import main\n"
        "code = main(['plan', 'model', '--json'])\n"
        "print('HEAVY', 'torch' in sys.modules, code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY False 0"


def test_commands_are_those_of_the_pipeline_and_three_more() -> None:
    assert [stage.name for stage in pipeline.STAGES] == ORDER
    assert set(COMMANDS) == {*ORDER, "plan", "run", "demo"}


@pytest.mark.parametrize("stage", pipeline.STAGES, ids=lambda stage: stage.name)
def test_every_stage_module_has_a_run(stage: pipeline.Stage) -> None:
    assert callable(importlib.import_module(stage.module).run)


def test_plan_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "plan model --context 1k --batch 2 --weights nvfp4 --reserve 1MiB --json".split()
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["layers"] == {"mamba": 3, "ffn": 3, "attention": 1}
    assert plan["memory_bytes"]["kv_cache"] == 1024 * 2 * 2 * 2 * 8 * 2  # T B K,V heads dim bytes
    assert plan["memory_bytes"]["reserve"] == 2**20
    assert plan["memory_bytes"]["total"] == sum(
        size for item, size in plan["memory_bytes"].items() if item != "total"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "nowhere"], "nowhere does not exist"),
        (["plan", "model", "--context", "1m"], "did you mean M?"),
        (["plan", "model", "--budget", "3gib"], "did you mean GiB?"),
        (["plan", "model", "--budget", "1B"], "cannot be reached"),
        (["plan", "model", "--weights", "fp16"], "'fp16' is not one of"),
        (["run", "missing.yaml"], "there is no recipe missing.yaml"),
        (["run", "my.yaml", "--set", "serch.trials=3"], "did you mean search?"),
        (["run", "my.yaml", "--set", "budget=83"], 'budget "83" has no unit'),
        (["score", "nowhere"], "nowhere does not exist"),
        (["serch", "my.yaml"], "did you mean search?"),
        (["score"], "Missing argument 'TARGET'"),
        (["score", "my.yaml", "--sett", "a=b"], "No such option"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert expected in printed.err
    assert printed.err.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in printed.err


def test_run_does_every_stage_once_and_in_order(
    here: Path, stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "my.yaml"]) == 0
    assert stages == ORDER
    first = (here / "runs" / "my" / "summary.json").read_text()
    capsys.readouterr()

    assert main(["run", "my.yaml"]) == 0
    assert stages == ORDER  # nothing again
    assert (here / "runs" / "my" / "summary.json").read_text() == first
    printed = capsys.readouterr().out
    assert "80.0 ± 2.0" in printed and "85.0" in printed  # a task, the mean of both
    assert 'from_pretrained("runs/my/export")' in printed
    assert max(len(line) for line in printed.splitlines()) <= 80


def test_summary(here: Path, stages: list[str]) -> None:
    assert main(["run", "my.yaml", "--set", "deployment.weights=nvfp4"]) == 0
    summary = json.loads((here / "runs" / "my" / "summary.json").read_text())
    assert set(summary) == {
        *("schema_version", "budget_bytes", "deployment", "seconds"),
        *("teacher", "pruned", "repaired", "student"),
    }
    assert summary["budget_bytes"] == 1800  # 90 % of the teacher's 2000
    assert summary["deployment"] == {
        **{"context": "2k", "batch": 1, "weights": "nvfp4", "embeddings": "nvfp4"},
        **{"kv": "bf16", "state": "fp32", "conv": "bf16", "reserve": "0GiB"},
    }
    assert list(summary["seconds"]) == ORDER
    assert set(summary["student"]) == {
        *("path", "parameters", "memory_bytes", "bits_per_byte", "tasks"),
        "decode_tokens_per_second",
    }


def test_a_run_folder_stands_for_its_recipe(here: Path, stages: list[str]) -> None:
    assert main(["score", "my.yaml", "--run", "elsewhere", "--set", "seed=5"]) == 0
    assert main(["score", "elsewhere"]) == 0
    assert stages == ["score"]
    assert (here / "elsewhere" / "scores" / "out.txt").read_text() == "score 5"
    recipe = Recipe.load(here / "elsewhere" / "recipe.yaml")
    assert recipe.seed == 5 and recipe.model == str(here / "model")

    assert main(["score", "elsewhere", "--set", "seed=6"]) == 0
    assert stages == ["score", "score"]


def test_a_model_stands_for_the_default_recipe(here: Path, stages: list[str]) -> None:
    assert main(["score", "model"]) == 0
    recipe = Recipe.load(here / "runs" / "model" / "recipe.yaml")
    assert recipe == Recipe.from_mapping({"model": str(here / "model")})


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("the shard is cut; get it again"), 2, "Error: the shard is cut; get it again"),
        (UserError("two\nlines"), 2, "Error: two lines"),
        (KeyboardInterrupt(), 130, "Stopped; run the same command again to go on."),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/y"),
            2,
            "Error: /x/y: Permission denied",
        ),
        (OSError(errno.EROFS, "Read-only file system"), 2, "Error: Read-only file system"),
    ],
)
def test_what_goes_wrong_in_a_stage(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    expected: str,
) -> None:
    def run(recipe: Recipe, folder: RunFolder) -> None:
        raise error

    replace_stage(monkeypatch, "score", run)
    assert main(["score", "my.yaml"]) == code
    assert capsys.readouterr().err.strip() == expected


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), FileNotFoundError(2, "ours", "x")])
def test_our_own_bugs_keep_their_traceback(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run(recipe: Recipe, folder: RunFolder) -> None:
        raise error

    replace_stage(monkeypatch, "score", run)
    with pytest.raises(type(error), match="ours"):
        main(["score", "my.yaml"])


def test_full_disk_in_a_stage_leaves_nothing_that_looks_whole(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(work: Path) -> None:
        (work / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def run(recipe: Recipe, folder: RunFolder) -> None:
        folder.run_stage("score", "scores", {}, body)

    replace_stage(monkeypatch, "score", run)
    assert main(["score", "my.yaml"]) == 2
    assert "the disk is full while writing runs/my/scores" in capsys.readouterr().err
    assert not (here / "runs" / "my" / "scores").exists()


def test_dry_run_writes_nothing(
    here: Path, stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "my.yaml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:11]] == [*ORDER, "to"]  # to do
    assert max(map(len, lines)) <= 80
    assert stages == [] and not (here / "runs").exists()


def test_disk_is_asked_for_before_anything_is_done(
    here: Path,
    stages: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = types.SimpleNamespace(total=2**40, used=2**40 - 2**20, free=2**20)
    monkeypatch.setattr("minipuzzle.files.shutil.disk_usage", lambda path: usage)
    assert main(["run", "my.yaml"]) == 2
    assert "1.00 MiB are free" in capsys.readouterr().err
    assert stages == []


def test_dry_run_grows_with_the_work(here: Path) -> None:
    from minipuzzle.estimate import estimate

    def seconds(*overrides: str) -> dict[str, Any]:
        needs = estimate(Recipe.load("my.yaml", overrides))
        return {need.stage: need.seconds for need in needs}

    little, much = seconds("distill.steps=10"), seconds("distill.steps=100000")
    assert much["distill"] > 100 * little["distill"]
