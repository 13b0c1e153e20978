"""The script that trains the demo's teacher, and the teacher that is in the package."""

import dataclasses
import json
import shutil
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import teacher_corpus
import teacher_forward
import teacher_llama
import teacher_model
import teacher_tokenizer
import teacher_training
import train_demo_teacher

from minipuzzle.errors import UserError
from minipuzzle.model import load

SMALL = teacher_model.Shape(
    "M-M*",
    hidden=32,
    ffn=48,
    heads=8,
    head_dim=16,
    state=16,
    query_heads=2,
    kv_heads=1,
    attention_dim=16,
    vocabulary=64,
)
SMALL_LLAMA = teacher_llama.LlamaShape(
    blocks=2, hidden=64, ffn=96, query_heads=4, kv_heads=2, attention_dim=32, vocabulary=64
)
SHAPES = [SMALL, SMALL_LLAMA]
TEACHER = Path(str(files("minipuzzle.demo"))) / "teacher"


def small_model(shape: teacher_forward.AnyShape = SMALL, seed: int = 0) -> torch.nn.Module:
    model: torch.nn.Module = teacher_forward.build(shape, seed=seed, device=torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_fast_forward_and_its_gradients_equal_the_stock_model(
    shape: teacher_forward.AnyShape,
) -> None:
    model = small_model(shape)
    ids = torch.randint(shape.vocabulary, (2, 3 * teacher_model.CHUNK))
    fast = teacher_forward.FastForward(model, shape, torch.float32, compiled=False)(ids)
    torch.autograd.backward(fast.mean())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logits = model(ids).logits[:, :-1]
    stock = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.autograd.backward(stock.mean())
    torch.testing.assert_close(fast.flatten(), stock, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoint_loads_in_the_stock_class(
    shape: teacher_forward.AnyShape, tmp_path: Path
) -> None:
    model = small_model(shape)
    tokenizer = teacher_tokenizer.train_tokenizer(["def f(x):\n    return x\n" * 9], vocabulary=300)
    teacher_tokenizer.save_tokenizer(tokenizer, tmp_path / "tokenizer", 128)
    teacher_forward.save_checkpoint(
        model, shape, tmp_path / "tokenizer", tmp_path / "out", max_shard_bytes=20_000
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if shape is SMALL:
        assert config["hybrid_override_pattern"] == "M-M*"
    assert not {"layers_block_type", "num_experts_per_tok", "n_routed_experts"} & set(config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(value.bfloat16().float(), loaded.state_dict()[name]), name
    ids = torch.randint(shape.vocabulary, (1, teacher_model.CHUNK))
    ours = load(tmp_path / "out").module(ids).logits
    torch.testing.assert_close(ours, loaded(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", [{"ffn": 100}, {"query_heads": 6}, {"kv_heads": 3}])
def test_llama_shapes_that_do_not_load_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        dataclasses.replace(SMALL_LLAMA, **change)


@pytest.mark.parametrize(("name", "low", "high"), [("large", 26e6, 28e6), ("llama", 8e6, 1e7)])
def test_size_of_the_models_of_the_ablations(name: str, low: float, high: float) -> None:
    with torch.device("meta"):
        model = train_demo_teacher.SHAPES[name].stock()
    assert low <= sum(p.numel() for p in model.parameters()) + 300 <= high


@pytest.mark.parametrize("change", [{"hidden": 40}, {"heads": 12}, {"groups": 3}])
def test_shapes_that_cannot_be_pruned_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(3, 8, 32), (2, 48, 16)])
def test_muon_update_has_equal_singular_values(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    update = teacher_training._orthogonal(torch.randn(size)).float()
    values = torch.linalg.svdvals(update) / (0.2 * max(size[1:]) ** 0.5)
    assert values.min() > 0.5 and values.max() < 1.4


def test_bits_per_byte_counts_windows_without_context() -> None:
    tokens = torch.tensor([0, 1, 2, 3, 1, 2, 3, 0, 9])
    sizes = torch.tensor([0, 1, 2, 4] + [0] * 6)

    def two_bits(ids: torch.Tensor) -> torch.Tensor:
        return torch.full((ids.shape[0], ids.shape[1] - 1), 2 * float(np.log(2)))

    # Windows 0123 and 1230: six predicted tokens of two bits, bytes 1+2+4 and 2+4+0.
    found = teacher_training.bits_per_byte(two_bits, tokens, sizes, block=4, batch=1)
    assert found == pytest.approx(12 / 13)


def test_batches_cover_the_text_once_per_pass() -> None:
    settings = teacher_training.Settings(steps=1, batch=2, block=4)
    stream = teacher_training.batches(torch.arange(43), settings)
    first = torch.cat([next(stream) for _ in range(4)]).flatten()
    assert len(set(first.tolist())) == len(first)


def test_files_of_unseen_packages_and_copies_are_left_out() -> None:
    def text(seed: int) -> str:
        lines = (f"value_{seed}_{i} = compute_something({i}, {seed})" for i in range(20))
        return "\n".join(lines) + "\n"

    digest = teacher_corpus.digest_text
    accept = teacher_corpus.Filter([digest("optuna/x.py", text(0))], teacher_corpus.Limits())
    reasons = [
        accept.reason_against(digest("p/a.py", text(1))),
        accept.reason_against(digest("p/b.py", text(1))),
        accept.reason_against(digest("p/c.py", text(1) + "x = 1\n")),
        accept.reason_against(digest("p/d.py", text(0) + "x = 1\n")),
        accept.reason_against(digest("p/vendor/networkx/e.py", text(2))),
        accept.reason_against(digest("p/f.py", "x = 0" * 1000)),
    ]
    assert reasons == [
        None,
        "same content as another file",
        "nearly the same as other files",
        "lines of an unseen package",
        "path of an unseen package",
        "very long lines",
    ]


def test_bundled_teacher() -> None:
    """Small enough, loads with its tokenizer, and has learned Python."""
    assert (TEACHER / "model.safetensors").stat().st_size <= 16 * 2**20
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    assert tokenizer.is_fast and tokenizer.eos_token_id == 0 and tokenizer.pad_token_id == 1
    text = "class Point:\n    def __init__(self, x, y):\n        self.x = x  # ü\n        self.y ="
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " y"


def test_manifest_keeps_the_unseen_packages_out() -> None:
    manifest = json.loads((TEACHER / "manifest.json").read_text())
    names = {package["name"].lower() for package in manifest["packages"]}
    assert names.isdisjoint(teacher_corpus.UNSEEN_PACKAGES)
    assert sum(package["tokens"] for package in manifest["packages"]) == manifest["tokens"]


def test_a_run_reads_the_first_share_of_the_text() -> None:
    half = teacher_training.Settings()
    manifest = train_demo_teacher.with_read({"tokens": 11}, half)
    assert manifest["read"] == {"first_token": 0, "last_token": 4, "tokens": 5, "of_tokens": 11}
    assert teacher_training.read_count(11, dataclasses.replace(half, text_share=1)) == 11
    with pytest.raises(ValueError):
        teacher_training.read_count(11, dataclasses.replace(half, text_share=1.5))


def test_log_and_manifest_of_the_bundled_teacher_tell_of_the_default_run() -> None:
    lines = (TEACHER / "training_log.jsonl").read_text().splitlines()
    start, text, *_, end = map(json.loads, lines)
    settings = teacher_training.Settings(steps=train_demo_teacher.STEPS)
    for name in ("steps", "batch", "block", "rate", "optimizer", "decay", "warmup", "clip", "seed"):
        assert start["settings"][name] == getattr(settings, name), name
    assert start["shape"] == dataclasses.asdict(train_demo_teacher.SHAPES["wide-heads"])
    read = json.loads((TEACHER / "manifest.json").read_text())["read"]
    assert read["tokens"] == text["tokens_of_text"] == read["last_token"] + 1
    assert read["tokens"] == teacher_training.read_count(read["of_tokens"], settings)
    assert read["tokens_trained_on"] == end["tokens"]


def prepare(folder: Path, *, processes: int) -> None:
    """A few packages' text under the bundled tokenizer; of the unseen ones only optuna."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_corpus, "UNSEEN_PACKAGES", ("optuna", "no-such-package"))
        teacher_corpus.prepare(
            folder,
            ["click", "packaging"],
            vocabulary=4096,
            context=2048,
            limits=teacher_corpus.Limits(package_bytes=300_000),
            tokenizer=TEACHER,
            processes=processes,
        )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("text")
    prepare(folder, processes=1)
    return folder


def test_text_is_what_the_manifest_says(text: Path) -> None:
    manifest = json.loads((text / "manifest.json").read_text())
    tokens = np.fromfile(text / "train.bin", dtype="<u2")
    assert len(tokens) == manifest["tokens"] and (tokens == 0).sum() == manifest["files"] > 20
    sizes = np.load(text / "token_bytes.npy")
    assert sizes[tokens].sum() == manifest["bytes"]
    assert [count["name"] for count in manifest["unseen"]] == ["optuna"]
    unseen = np.fromfile(text / "optuna.bin", dtype="<u2")
    assert sizes[unseen].sum() == manifest["unseen"][0]["bytes"]


def test_two_processes_prepare_the_text_of_one(text: Path, tmp_path: Path) -> None:
    prepare(tmp_path, processes=2)
    for name in ("train.bin", "optuna.bin", "manifest.json"):
        assert (tmp_path / name).read_bytes() == (text / name).read_bytes(), name


def test_installed_packages_are_all_but_the_unseen_ones() -> None:
    names = set(teacher_corpus.installed_packages())
    assert {"stdlib", "torch", "scikit-learn", "click"} <= names
    assert names.isdisjoint({*teacher_corpus.UNSEEN_PACKAGES, "minipuzzle"})


def test_text_needs_a_package_to_measure_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nothing(package: str) -> list[tuple[str, Path]]:
        return []

    monkeypatch.setattr(teacher_corpus, "_sources", nothing)
    with pytest.raises(UserError, match="optuna or mpmath"):
        teacher_corpus.prepare(
            tmp_path, ["click"], vocabulary=300, context=128, limits=teacher_corpus.Limits()
        )


@pytest.mark.parametrize("shape", ["tiny", "tiny-llama"])
def test_a_short_run_writes_a_folder_that_loads(
    shape: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole script on a few packages: the loss falls, the folder is whole."""
    data = tmp_path / "text"
    shutil.copytree(text, data)
    np.fromfile(data / "optuna.bin", dtype="<u2")[:2048].tofile(data / "optuna.bin")
    words = f"--shape {shape} --out {tmp_path / 'out'} --data {data} --steps 30 --warmup 5"
    monkeypatch.setattr("sys.argv", ["train", *words.split(), "--batch", "2", "--block", "128"])
    train_demo_teacher.main()
    lines = (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    first = next(line["first_loss"] for line in log if "first_loss" in line)
    end = next(line for line in log if "finished" in line)
    assert end["step"] == 30 and set(end["bits_per_byte"]) == {"optuna"}
    model = load(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.from_numpy(np.fromfile(data / "train.bin", "<u2")[:512].astype(np.int64))[None]
    with torch.no_grad():
        loss = float(stock(ids, labels=ids).loss)
        torch.testing.assert_close(model.module(ids).logits, stock(ids).logits, atol=1e-3, rtol=0)
    assert loss < first - 1
    assert model.tokenizer.eos_token_id == 0


def test_sizes_of_the_other_family_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"train --shape llama --state 32 --out {tmp_path / 'out'}"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit):
        train_demo_teacher.main()
    assert "--state is no size of --shape llama" in capsys.readouterr().err
