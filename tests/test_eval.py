"""Evaluation: bits per byte, answers, comparison, the stage."""

from __future__ import annotations

import json
import math
import random
import runpy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from minipuzzle import model
from minipuzzle.data.packing import byte_lengths
from minipuzzle.errors import UserError
from minipuzzle.eval import run
from minipuzzle.eval.bpb import bits_per_byte
from minipuzzle.eval.harness import Tasks, _Scorer
from minipuzzle.eval.questions import keep_questions_only, prepare
from minipuzzle.eval.speed import measure
from minipuzzle.source import demo_teacher
from tests.tiny_text import LINES, tiny_run, write_model

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> model.Model:
    return model.load(write_model(tmp_path_factory.mktemp("model") / "m"))


# --- bits per byte


def test_bits_per_byte_equals_the_sum_over_single_predictions(loaded: model.Model) -> None:
    blocks = torch.randint(0, 264, (5, 12), generator=torch.Generator().manual_seed(0))
    blocks[:, 4] = 0  # the end-of-text token
    lengths = byte_lengths(loaded.tokenizer, 264)
    nats, tokens, size = 0.0, 0, 0
    for row in blocks:
        for place in range(1, 12):
            token = int(row[place])
            if token in (0, 1):
                continue
            logits = loaded.module(input_ids=row[None, :place]).logits[0, -1].double()
            nats -= float(torch.log_softmax(logits, -1)[token])
            tokens += 1
            size += len(loaded.tokenizer.convert_ids_to_tokens(token))
    result = bits_per_byte(loaded.module, blocks, lengths)
    assert (result.tokens, result.bytes) == (tokens, size)
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_batching_does_not_change_bits_per_byte(
    loaded: model.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = torch.randint(2, 264, (7, 20), generator=torch.Generator().manual_seed(1))
    lengths = byte_lengths(loaded.tokenizer, 264)
    together = bits_per_byte(loaded.module, blocks, lengths)
    monkeypatch.setattr("minipuzzle.eval.bpb.LOGIT_BYTES", 1)
    alone = bits_per_byte(loaded.module, blocks, lengths)
    assert together.nats == pytest.approx(alone.nats, rel=1e-6)
    assert (together.tokens, together.bytes) == (alone.tokens, alone.bytes)


# --- lm-eval


def requests(seed: int) -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """Contexts of many lengths, continuations of one to four tokens, three to a context.

    Token 0 is what the harness pads with, so texts hold it too, at their ends as well.
    """
    rng = random.Random(seed)
    made = []
    for i in range(25):
        context = [rng.randrange(264) for _ in range(rng.randint(1, 60))]
        context[-1] = 0 if i % 3 == 0 else context[-1]
        for choice in range(3):
            answer = [rng.randrange(264) for _ in range(rng.choice([1, 1, 1, 2, 4]))]
            answer[0] = 0 if choice == 0 else answer[0]
            made.append(((f"context {i}", f"choice {choice}"), context, answer))
    return made


@pytest.mark.parametrize("batch", [1, 6, 64])
def test_padded_batches_give_the_scores_of_single_forward_passes(
    loaded: model.Model, batch: int
) -> None:
    asked = requests(batch)
    scorer = _Scorer(
        pretrained=loaded.module,
        tokenizer=loaded.tokenizer,
        batch_size=batch,
        softmax_dtype=torch.float32,
    )
    scorer.fixed_batch = batch
    scores = scorer._loglikelihood_tokens(asked)
    for (_, context, answer), (score, greedy) in zip(asked, scores, strict=True):
        logits = loaded.module(input_ids=torch.tensor([context + answer[:-1]])).logits[0]
        logs = torch.log_softmax(logits[-len(answer) :].double(), -1)
        assert score == pytest.approx(float(logs[range(len(answer)), answer].sum()), abs=2e-4)
        assert greedy == (logs.argmax(-1).tolist() == answer)


def test_logits_are_taken_where_needed_only(
    loaded: model.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    forward = loaded.module.forward

    def spy(**arguments: Any) -> Any:
        kept.append(arguments["logits_to_keep"])
        return forward(**arguments)

    monkeypatch.setattr(loaded.module, "forward", spy)
    scorer = _Scorer(pretrained=loaded.module, tokenizer=loaded.tokenizer, batch_size=4)
    scorer._loglikelihood_tokens([(("", ""), [5] * 40, [token]) for token in range(2, 6)])
    assert kept == [1]  # one context for four single-token answers, and only its last position


def write_task(folder: Path, name: str, questions: int) -> None:
    folder.mkdir(exist_ok=True)
    rng = random.Random(name)
    rows = [
        {
            "context": "\n".join(
                rng.choices([line for line in LINES if line], k=rng.randint(1, 4))
            ),
            "choices": ["x", "return", "("],
            "answer": rng.randrange(3),
        }
        for _ in range(questions)
    ]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: '{data}'}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{context}}"\n'
        "doc_to_choice: choices\n"
        "doc_to_target: answer\n"
        'target_delimiter: ""\n'
        "metric_list: [{metric: acc}]\n"
    )


def expected_answers(loaded: model.Model, data: Path) -> dict[int, float]:
    """The questions answered without lm-eval: the choice of the highest logit."""
    answers = {}
    for number, line in enumerate(data.read_text().splitlines()):
        row = json.loads(line)
        ids = loaded.tokenizer(row["context"], add_special_tokens=False)["input_ids"]
        logits = loaded.module(input_ids=torch.tensor([ids])).logits[0, -1]
        choices = [
            loaded.tokenizer(choice, add_special_tokens=False)["input_ids"][0]
            for choice in row["choices"]
        ]
        answers[number] = float(int(logits[choices].argmax()) == row["answer"])
    return answers


def test_answers_of_a_group_of_local_tasks(
    loaded: model.Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, questions in (("first", 30), ("second", 12)):
        write_task(tmp_path, name, questions)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [first, second]\n")
    tasks = Tasks(["both"], folder=tmp_path, defaults=False)
    assert tasks.names == ["first", "second"]
    answers = tasks.answers(loaded.module, loaded.tokenizer, label="model")
    for name in tasks.names:
        expected = expected_answers(loaded, tmp_path / f"{name}.jsonl")
        assert answers[name] == expected
        assert 0 < sum(expected.values()) < len(expected)
    assert answers == tasks.answers(loaded.module, loaded.tokenizer, label="again")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_limit_asks_the_first_questions(loaded: model.Model, tmp_path: Path) -> None:
    write_task(tmp_path, "first", 30)
    all_of_them = Tasks(["first"], folder=tmp_path, defaults=False)
    some = Tasks(["first"], folder=tmp_path, defaults=False, limit=7)
    answers = all_of_them.answers(loaded.module, loaded.tokenizer, label="")["first"]
    limited = some.answers(loaded.module, loaded.tokenizer, label="")["first"]
    assert limited == {number: answers[number] for number in range(7)}


def test_unknown_task(tmp_path: Path) -> None:
    write_task(tmp_path, "first", 2)
    with pytest.raises(UserError, match="'frist'"):
        Tasks(["first", "frist"], folder=tmp_path, defaults=False)


def test_questions_made_from_packages(tmp_path: Path) -> None:
    teacher = model.load(demo_teacher())
    sources = {"report": "python-packages:mpmath", "search": "python-packages:optuna"}
    made: dict[int, dict[str, str]] = {}
    for seed in (0, 0, 1):
        place = tmp_path / "tasks"
        tasks = prepare(("demo",), sources, teacher.tokenizer, place, limit=2, seed=seed)
        answers = tasks.answers(teacher.module, teacher.tokenizer, label="")
        assert len(answers) >= 4 and all(len(given) == 2 for given in answers.values())
        keep_questions_only(place)
        texts = {path.name: path.read_text() for path in place.iterdir()}
        assert set(texts) == {f"{name}.jsonl" for name in answers}
        assert made.setdefault(seed, texts) == texts
    assert made[0] != made[1]


def test_questions_need_packages(loaded: model.Model, tmp_path: Path) -> None:
    sources = {"report": "some.txt", "search": "python-packages:mpmath"}
    with pytest.raises(UserError, match="data.report.source"):
        prepare(("demo",), sources, loaded.tokenizer, tmp_path / "t", limit=2, seed=0)


# --- speed


def test_speed_runs_the_models_in_turns(loaded: model.Model) -> None:
    calls: list[tuple[str, int]] = []

    class Spy(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.inner, self.name = loaded.module, name

        def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
            calls.append((self.name, input_ids.shape[1]))
            return self.inner(input_ids=input_ids, **more)

    prompt = torch.arange(20).view(2, 10)
    speeds = measure({"a": Spy("a"), "b": Spy("b")}, prompt, tokens=3, repeats=2)
    one = [10, 1, 1, 1]
    assert calls == [(name, n) for name in "ababab" for n in one]
    assert all(s.prefill_tokens_per_second > 0 for s in speeds.values())
    assert all(s.decode_tokens_per_second > 0 for s in speeds.values())


# --- the stage


def evaluation(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return record


@pytest.fixture
def tasks_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path / "tasks", "first", 20)
    tasks = Tasks(["first"], folder=tmp_path / "tasks", defaults=False)
    monkeypatch.setattr("minipuzzle.eval.stage.prepare", lambda *_, **__: tasks)


@pytest.mark.usefixtures("tasks_on_disk")
def test_stage_measures_the_models_that_exist(tmp_path: Path) -> None:
    recipe, folder = tiny_run(tmp_path, tasks=("first",))
    record = evaluation(run(recipe, folder))
    assert list(record["models"]) == ["teacher", "student"]
    teacher, student = record["models"].values()
    assert (folder.path / teacher["path"]).samefile(tmp_path / "teacher")
    assert student["path"] == "student"
    stock = model.load(tmp_path / "teacher").module
    assert teacher["parameters"] == sum(p.numel() for p in stock.parameters())
    assert teacher["memory_bytes"] == sum(teacher["memory"].values())
    assert student["memory_bytes"] < teacher["memory_bytes"]
    assert set(teacher["tasks"]["first"]) == {"acc", "acc_stderr", "n"}
    assert record["against_teacher"]["student"]["tasks"]["first"]["n"] == 20
    for item in ("bits_per_byte", "decode_tokens_per_second", "prefill_tokens_per_second"):
        assert teacher[item] > 0


@pytest.mark.usefixtures("tasks_on_disk")
def test_a_killed_stage_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = tiny_run(tmp_path, tasks=("first",))
    measured: list[int] = []

    def counted(module: Any, *rest: Any, **more: Any) -> Any:
        measured.append(len(list(module.parameters())))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return bits_per_byte(module, *rest, **more)

    monkeypatch.setattr("minipuzzle.eval.stage.bits_per_byte", counted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder)
    assert not (folder.path / "evaluation").exists()
    resumed = evaluation(run(recipe, folder))
    teacher, student = measured[0], measured[1]
    assert measured == [teacher, student, student]
    (tmp_path / "other").mkdir()
    whole = evaluation(run(recipe, tiny_run(tmp_path / "other")[1]))
    for name, record in whole["models"].items():
        for item in ("parameters", "memory", "bits_per_byte", "tasks"):
            assert resumed["models"][name][item] == record[item]


def test_without_tasks_there_is_no_accuracy(tmp_path: Path) -> None:
    recipe, folder = tiny_run(tmp_path)
    record = evaluation(run(recipe, folder))
    assert record["models"]["teacher"]["tasks"] == {}
    assert "against_teacher" not in record


# --- scripts/compare_full.py


@pytest.mark.usefixtures("tasks_on_disk")
def test_full_comparison_of_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = tiny_run(tmp_path, tasks=("first",))
    short = evaluation(run(recipe, folder))
    write_task(tmp_path / "all", "first", 80)
    every = Tasks(["first"], folder=tmp_path / "all", defaults=False)
    script = runpy.run_path(str(SCRIPTS / "compare_full.py"))
    asked: list[Any] = []

    def prepare(names: Any, sources: Any, *_: Any, **more: Any) -> Tasks:
        asked.append((tuple(names), sources["report"], more["limit"], more["seed"]))
        return every

    monkeypatch.setitem(script["_answers"].__globals__, "prepare", prepare)
    result = tmp_path / "result.json"
    assert script["main"]([str(folder.path), "--json", str(result)]) == 0
    assert asked == [(("first",), recipe.data.report.source, None, recipe.seed)]
    record = json.loads(result.read_text())
    both = {name: task["tasks"]["first"] for name, task in record["models"].items()}
    assert list(both) == ["teacher", "student"]
    for name, task in both.items():
        loaded = model.load(folder.path / short["models"][name]["path"])
        expected = expected_answers(loaded, tmp_path / "all" / "first.jsonl")
        assert task["n"] == 80
        assert task["acc"] == pytest.approx(statistics.fmean(expected.values()))
    gap = record["against_teacher"]["student"]["tasks"]["first"]
    assert gap["mean"] == pytest.approx(both["student"]["acc"] - both["teacher"]["acc"])
    assert "student keeps" in capsys.readouterr().out


def test_full_comparison_without_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(SCRIPTS / "compare_full.py"))
    assert script["main"]([str(tmp_path)]) == 2
    assert "evaluation" in capsys.readouterr().err
