"""The demo's questions: made by one reading of the sources, checked here by another."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minipuzzle.data.packages import python_package_documents
from minipuzzle.demo.keywords import INFIX, _places
from minipuzzle.demo.kinds import KINDS
from minipuzzle.demo.questions import (
    CONTEXT_TOKENS,
    QUESTIONS_PER_FILE,
    SHORTEST_CONTEXT,
    Question,
    Tokens,
    find_last_word,
    make_questions,
    shuffled,
)
from minipuzzle.demo.scopes import parse
from minipuzzle.demo.spots import first_word
from minipuzzle.demo.tasks import write_tasks
from minipuzzle.errors import UserError

PACKAGES = ["mpmath", "click"]
COMPOSED = {"imported", "attribute"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE of 2048 tokens with GPT-2's pre-tokenisation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [document.text for document in python_package_documents(["jinja2", "click", "mpmath"])]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture(scope="module")
def made(tokenizer: Any) -> dict[str, list[Question]]:
    return make_questions(KINDS, PACKAGES, tokenizer, limit=40, seed=0)


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return {document.name: document.text for document in python_package_documents(PACKAGES)}


def truth(question: Question) -> str:
    return question.choices[question.answer]


def wrong(question: Question) -> list[str]:
    return [c for i, c in enumerate(question.choices) if i != question.answer]


def every(made: dict[str, list[Question]], *kinds: str) -> list[Question]:
    assert all(len(made[kind]) >= 5 for kind in kinds or made)
    return [q for kind in kinds or made for q in made[kind]]


# --- what is true of every question


def test_choices_are_single_tokens_for_the_harness(
    made: dict[str, list[Question]], tokenizer: Any
) -> None:
    for question in every(made):
        assert not question.context[-1].isspace()
        context = tokenizer(question.context)["input_ids"]
        assert SHORTEST_CONTEXT <= len(context) <= CONTEXT_TOKENS
        ids = set()
        for choice in question.choices:
            whole = tokenizer(question.context + choice)["input_ids"]
            assert whole[:-1] == context
            ids.add(whole[-1])
        assert len(ids) == len(question.choices)


def test_the_right_choice_is_what_the_file_says(
    made: dict[str, list[Question]], files: dict[str, str]
) -> None:
    for question in every(made):
        text = files[question.source.rpartition(":")[0]]
        shown = question.context + truth(question)
        if question.kind in COMPOSED:  # the last lines are the file's, the first are put together
            shown = shown[-min(len(shown), 40) :]
        assert shown in text


def test_answers_do_not_prefer_a_position(made: dict[str, list[Question]]) -> None:
    for kind in KINDS:
        counts = Counter(q.answer for q in made[kind.name])
        total, expected = sum(counts.values()), sum(counts.values()) / kind.choices
        assert set(counts) <= set(range(kind.choices))
        chi_squared = sum((counts[i] - expected) ** 2 / expected for i in range(kind.choices))
        assert total < 30 or chi_squared < 17  # p = 0.001 for three degrees of freedom: 16.3


def test_questions_are_all_different(made: dict[str, list[Question]]) -> None:
    for questions in made.values():
        assert len({(q.context, truth(q)) for q in questions}) == len(questions)


def test_other_processes_and_tokenizer_objects_make_the_same(
    tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "t")
    program = (
        "import sys\nfrom transformers import AutoTokenizer\n"
        "from minipuzzle.demo.kinds import KINDS\n"
        "from minipuzzle.demo.questions import make_questions\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(make_questions(KINDS, ['click'], t, limit=10, seed=3))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "t")],
        env={"PYTHONHASHSEED": "77", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = make_questions(KINDS, ["click"], tokenizer, limit=10, seed=3)
    assert run.stdout.strip().splitlines()[-1] == str(here)
    assert here != make_questions(KINDS, ["click"], tokenizer, limit=10, seed=4)


def test_limited_questions_are_among_all_and_from_many_files(tokenizer: Any) -> None:
    limited = make_questions(KINDS, ["click"], tokenizer, limit=12, seed=0)
    unlimited = make_questions(KINDS, ["click"], tokenizer, limit=None, seed=0)
    for kind in KINDS:
        questions = limited[kind.name]
        per_file = Counter(q.source.rpartition(":")[0] for q in questions)
        assert max(per_file.values(), default=0) <= QUESTIONS_PER_FILE
        assert len(questions) <= min(12, len(unlimited[kind.name]))
        assert set(questions) <= set(unlimited[kind.name])
    assert len(limited["scope"]) == 12 < len(unlimited["scope"])


# --- what each kind promises


def names_at(code: Any, line: int) -> set[str]:
    """Local names of all code objects of a compiled file that hold a line: Python's own word."""
    inner = [c for c in code.co_consts if hasattr(c, "co_varnames") and holds(c, line)]
    return {*code.co_varnames, *code.co_cellvars}.union(*(names_at(c, line) for c in inner))


def holds(code: Any, line: int) -> bool:
    inner = [c for c in code.co_consts if hasattr(c, "co_varnames")]
    own = [number for _, _, number in code.co_lines() if number]
    return code.co_firstlineno <= line and (
        line <= max(own, default=0) or any(holds(c, line) for c in inner)
    )


def test_wrong_names_are_out_of_scope(
    made: dict[str, list[Question]], files: dict[str, str]
) -> None:
    for question in every(made, "scope")[:60]:
        text = files[question.source.rpartition(":")[0]]
        if text.count(question.context) > 1:
            continue
        line = text[: text.index(question.context) + len(question.context)].count("\n") + 1
        scope = names_at(compile(text, "file", "exec"), line)
        assert truth(question).strip() in {first_word(name) for name in scope}
        assert not scope & {choice.strip() for choice in wrong(question)}
        mentioned = set(re.findall(r"\w+", question.context))
        assert not mentioned & {choice.strip() for choice in wrong(question)}


def test_rival_names_are_mentioned(made: dict[str, list[Question]]) -> None:
    for question in every(made, "next"):
        mentioned = {first_word(name) for name in re.findall(r"\w+", question.context)}
        assert {choice.strip() for choice in question.choices} <= mentioned


def test_wrong_arguments_are_mentioned_and_all_but_one_of_other_functions(
    made: dict[str, list[Question]], files: dict[str, str]
) -> None:
    for question in every(made, "argument"):
        text = files[question.source.rpartition(":")[0]]
        mentioned = {first_word(name) for name in re.findall(r"\w+", question.context)}
        assert {choice.strip() for choice in question.choices} <= mentioned
        line = text[: text.index(question.context) + len(question.context)].count("\n") + 1
        names = {first_word(name) for name in names_at(compile(text, "file", "exec"), line)}
        assert truth(question).strip() in names
        assert len(names & {choice.strip() for choice in wrong(question)}) <= 1


def test_imported_name_is_in_the_statements_shown(made: dict[str, list[Question]]) -> None:
    for question in every(made, "imported"):
        shown = question.context[: question.context.index("\n\n\n")]
        names = {
            first_word((alias.asname or alias.name).split(".")[0])
            for node in ast.parse(shown).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert truth(question).strip() in names
        assert not names & {choice.strip() for choice in wrong(question)}


def test_attribute_is_in_the_assignments_shown(made: dict[str, list[Question]]) -> None:
    for question in every(made, "attribute"):
        shown, _, method = question.context.partition("\n\n    ")
        set_there = {first_word(name) for name in re.findall(r"self\.(\w+)", shown)}
        assert truth(question) in set_there
        assert re.search(r"self\._*$", method)
        assert len(set_there & set(wrong(question))) <= 1


def test_keywords_are_not_the_in_of_a_loop(made: dict[str, list[Question]]) -> None:
    for question in every(made, "keyword"):
        assert all(choice.strip() in INFIX for choice in question.choices)
        line = question.context.rpartition("\n")[2]
        opened = line.count(" for ") + line.lstrip().startswith("for ")
        assert truth(question) != " in" or opened <= line.count(" in ")


# --- the parts


TEXT = '''\
import os.path as p, sys
from a.b import c

LIMIT = 3


class Box(Base):
    """A box."""

    def __init__(self, size, _color=None):
        self.size = size
        self._color: int = _color
        if size:
            self.late = 1

    def area(self, scale):
        total = [x * scale for x in self.size]
        for i, (j, k) in enumerate(total):
            with open(c) as file:
                print(f"{i}{scale}", self._color)
        return total


def outer(first, *rest, flag=False, **more):
    def inner(z):
        return z + first

    try:
        import json
    except ValueError as error:
        return error
    return inner(sys)
'''


def test_parse() -> None:
    file = parse("t", TEXT)
    assert file is not None
    functions = {function.name: function for function in file.functions}
    assert list(functions) == ["__init__", "area", "outer", "inner"]
    area, outer, inner = (functions[name] for name in ("area", "outer", "inner"))
    assert outer.parameters == ("first", "flag", "rest", "more")
    assert area.bound == {"self", "scale", "total", "x", "i", "j", "k", "file"}
    assert outer.bound == {"first", "rest", "flag", "more", "inner", "json", "error"}
    assert inner.bound == {"z"} and {"first", "LIMIT", "c", "p", "sys", "Box"} <= inner.visible
    assert "size" not in area.visible and "area" in area.visible and "print" in area.visible
    assert [use.name for use in inner.uses] == ["z", "first"]
    assert [use.name for use in area.returns] == ["total"]
    assert "i" not in {use.name for use in area.uses}  # only in a formatted string
    for function in file.functions:
        assert TEXT[function.start :].startswith(f"def {function.name}(")
        assert all(TEXT[use.place :].startswith(use.name) for use in function.uses)
    assert {name: TEXT[a:b] for name, (a, b) in file.imports.items()} == {
        "p": "import os.path as p, sys",
        "sys": "import os.path as p, sys",
        "c": "from a.b import c",
    }
    (box,) = file.classes
    assert TEXT[box.start : box.header_end] == "class Box(Base):"
    assert {name: TEXT[a:b] for name, (a, b) in box.initial.items()} == {
        "size": "self.size = size",
        "_color": "self._color: int = _color",
        "late": "self.late = 1",
    }
    assert area.owner is box and outer.owner is None
    assert [(f.name, use.name) for f, use in file.attributes] == [
        ("area", "size"),
        ("area", "_color"),
    ]


@pytest.mark.parametrize("text", ["x = 'é'\n", "if x:\n\ty\n", "x\r\n", "def f(:\n", "x = 1\f\n"])
def test_files_that_are_left_out(text: str) -> None:
    assert parse("t", text) is None


def test_places_of_keywords() -> None:
    text = (
        "for x in xs:\n    y = [a for a in b if a in c or not a]\n    z = 'a if b' # a if b\n"
        "    if x is not None and (x\n      or y) :\n        z = f'{a if b else c}' if a else b\n"
    )
    found = list(_places(text))
    assert [string for string, _ in found] == ["for", "if", "in", "or", "is", "and", "if", "else"]
    assert all(text[place:].startswith(string) for string, place in found)


def test_window_is_the_longest_run_of_lines_that_fits(
    tokenizer: Any, files: dict[str, str]
) -> None:
    tokens = Tokens(tokenizer)
    text = files["mpmath/ctx_mp.py"]
    for end in range(2000, 12000, 997):
        window = tokens.window(text, end, 64)
        if window is None:
            continue
        assert text[:end].endswith(window) and len(tokens.ids(window)) <= 64 + 2
        start = end - len(window)
        assert text[start - 1] == "\n"
        longer = text[text.rfind("\n", 0, start - 1) + 1 : end]
        assert len(tokens.ids(longer)) > 64 - 2


def test_find_last_word() -> None:
    assert find_last_word("a ab _a a(a1", "a") == 8
    assert find_last_word("a_a", "a") is None
    assert find_last_word("aa a", "a") == 3
    assert find_last_word("", "a") is None
    assert find_last_word("x ab.ab", "ab") == 5


def test_first_word() -> None:
    assert [first_word(n) for n in ("_graph_type", "x1", "G", "__", "a_b")] == [
        "graph",
        "x",
        "G",
        "__",
        "a",
    ]


def test_shuffled_is_a_permutation_that_the_key_decides() -> None:
    items = list(range(100))
    assert sorted(shuffled(items, 1, "a")) == items
    assert shuffled(items, 1, "a") == shuffled(iter(items), 1, "a")
    assert shuffled(items, 1, "a") != shuffled(items, 1, "b")


# --- lm-eval


def test_tasks_through_lm_eval(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, from a folder; an oracle has accuracy 1; one forward row per context."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import LlamaConfig, LlamaForCausalLM

    names = write_tasks(
        tmp_path / "t", tokenizer, limit=6, packages=PACKAGES, prefix="demo_search", seed=0
    )
    assert names == [f"demo_search_{kind.name}" for kind in KINDS]
    rows = [json.loads(line) for n in names for line in (tmp_path / "t" / f"{n}.jsonl").open()]
    truths = {(row["context"], row["choices"][row["answer"]]) for row in rows}

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = HFLM(LlamaForCausalLM(config), tokenizer=tokenizer, batch_size=8, device="cpu")
    seen: list[Any] = []
    call = model._model_call

    def counted(ids: Any, **options: Any) -> Any:
        seen.extend(list(ids))
        return call(ids, **options)

    monkeypatch.setattr(model, "_model_call", counted)
    manager = TaskManager(include_path=str(tmp_path / "t"), include_defaults=False)
    assert {"demo_search", *names} <= set(manager.all_tasks)
    result = evaluator.simple_evaluate(
        model, tasks=["demo_search"], task_manager=manager, bootstrap_iters=2, log_samples=True
    )
    assert len(seen) == len({row["context"] for row in rows})
    samples = [s for n in names for s in result["samples"][n]]
    assert len(samples) == len(rows)
    for sample in samples:
        pairs = [(a[0], a[1]) for a in sample["arguments"]]
        assert pairs[sample["target"]] in truths
        assert sum(pair in truths for pair in pairs) >= 1


def test_no_question_is_a_user_error(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no question could be made from this"):
        write_tasks(tmp_path, tokenizer, limit=1, packages=["this"], prefix="d", seed=0)
    with pytest.raises(UserError, match="fast tokenizer"):
        write_tasks(tmp_path, object(), limit=1, packages=PACKAGES, prefix="d", seed=0)
