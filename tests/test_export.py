"""Export: the folder holds the student and nothing else, and proves it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from minipuzzle import model
from minipuzzle.architecture import Architecture, AttentionLayer, FFNLayer, MambaLayer
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.errors import UserError
from minipuzzle.export import run
from minipuzzle.export.card import model_card
from minipuzzle.export.changes import describe_cut
from minipuzzle.export.stage import write_model as write_model_files
from minipuzzle.export.verify import CHILD, reference, verify
from minipuzzle.recipe import Recipe
from minipuzzle.runfolder import RunFolder
from tests.tiny_text import tiny_run, write_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, RunFolder]:
    place = tmp_path_factory.mktemp("export")
    recipe, folder = tiny_run(place)
    return run(recipe, folder), recipe, folder


def test_the_export_is_the_student(exported: tuple[Path, Recipe, RunFolder]) -> None:
    path, _, folder = exported
    ours, theirs = (Checkpoint.open(p) for p in (path, folder.artefact("student")))
    assert ours.names == theirs.names
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in ours.names)
    proof = json.loads((path / "verified.json").read_text())
    assert proof["holds"] and proof["max_logit_difference"] < 1e-3
    assert len(proof["tokens"]) == proof["tokens_agree"] == 64
    assert proof["logits_compared"] == 32 * 264


def test_the_config_is_what_servers_read(exported: tuple[Path, Recipe, RunFolder]) -> None:
    config = json.loads((exported[0] / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "M-M*-"
    assert config["num_hidden_layers"] == 5
    assert "layers_block_type" not in config
    assert not any("expert" in key or key.startswith("moe") for key in config)
    generation = json.loads((exported[0] / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def test_checksums_cover_every_file(exported: tuple[Path, Recipe, RunFolder]) -> None:
    path = exported[0]
    sums = {}
    for line in (path / "SHA256SUMS").read_text().splitlines():
        value, name = line.split("  ")
        sums[name] = value
    assert set(sums) == {p.name for p in path.iterdir()} - {"SHA256SUMS", "stage.json"}
    for name, value in sums.items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == value


def test_nothing_is_done_twice(exported: tuple[Path, Recipe, RunFolder]) -> None:
    path, recipe, folder = exported
    before = (path / "stage.json").stat().st_mtime_ns
    run(recipe, folder)
    assert (path / "stage.json").stat().st_mtime_ns == before


def test_strange_files_stay_behind(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    for name in ("pytorch_model.bin", "modeling_evil.py", "chat_template.jinja"):
        (source / name).write_text("x")
    (tmp_path / "copy").mkdir()
    write_model_files(source, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert "chat_template.jinja" in names
    assert not names & {"pytorch_model.bin", "modeling_evil.py"}


def corrupt(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["lm_head.weight"][3, 5] += 0.1
    save_file(tensors, shard, metadata={"format": "pt"})


def test_a_wrong_tensor_is_found_and_nothing_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = tiny_run(tmp_path)

    def write_wrong(source: Path, target: Path) -> None:
        write_model_files(source, target)
        corrupt(target)

    monkeypatch.setattr("minipuzzle.export.stage.write_model", write_wrong)
    with pytest.raises(UserError, match="not the student"):
        run(recipe, folder)
    assert not (folder.path / "export").exists()


def test_a_folder_that_does_not_load(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m")
    expected = reference(model.load(path).module, torch.arange(20).view(2, 10))
    (path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="does not load"):
        verify(path, expected)


def test_export_needs_a_student(tmp_path: Path) -> None:
    recipe, _ = tiny_run(tmp_path)
    with pytest.raises(UserError, match="student"):
        run(recipe, RunFolder(tmp_path / "empty"))


# --- the card


def test_card_of_a_measured_model(exported: tuple[Path, Recipe, RunFolder]) -> None:
    _, recipe, folder = exported
    teacher, student = Path(recipe.model), folder.artefact("student")
    task = {"names|in_scope": {"acc": 0.75, "acc_stderr": 0.01, "n": 100}}
    record = {"parameters": 1000, "bits_per_byte": 1.23456, "tasks": task}
    evaluation = {
        "models": {"teacher": record, "student": record},
        "against_teacher": {"student": {"retained": {"value": 0.981, "low": 0.97, "high": 0.99}}},
    }
    card = model_card(recipe, teacher=teacher, student=student, evaluation=evaluation)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "transformers"
    assert "license" not in header and "base_model" not in header
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert "| bits per byte | 1.2346 | 1.2346 |" in rows
    assert r"| names\|in\_scope, % | 75.0 ± 1.0 | 75.0 ± 1.0 |" in rows
    assert "98.1 %" in card and "97.0 to 99.0 %" in card
    assert "1 of 3 Mamba-2 layers removed" in card and "1 of 3 FFN layers removed" in card
    assert "M-M*-M-" in card
    assert str(teacher.parent) not in card and "calibration.txt" in card
    assert "\n\n\n" not in card


def test_card_takes_the_licence_of_the_parent(exported: tuple[Path, Recipe, RunFolder]) -> None:
    _, recipe, folder = exported
    readme = Path(recipe.model) / "README.md"
    readme.write_text("---\nlicense: apache-2.0\n---\n# x\n")
    student = folder.artefact("student")
    card = model_card(recipe, teacher=readme.parent, student=student, evaluation=None)
    readme.unlink()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    assert "Nothing was measured" in card


def test_changes_in_words() -> None:
    mamba, attention, ffn = MambaLayer(8, 8, 2, 16, 4), AttentionLayer(4, 2, 8), FFNLayer(48)
    before = Architecture(32, 97, False, (mamba, ffn, attention, ffn, mamba, ffn))
    after = Architecture(
        32, 97, False, (MambaLayer(4, 8, 2, 16, 4), FFNLayer(32), attention, FFNLayer(16))
    )
    assert describe_cut(before, after) == [
        "1 of 2 Mamba-2 layers removed",
        "1 of 3 FFN layers removed",
        "Mamba-2 heads 8 to 4",
        "FFN width 48 to 16-32",
    ]
    assert describe_cut(before, before) == []


def test_the_loading_process_does_not_know_minipuzzle() -> None:
    assert "minipuzzle" not in {
        line.split()[1].split(".")[0]
        for line in CHILD.read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
