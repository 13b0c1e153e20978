"""The script that trains the demo's teacher, and the teacher that is in the package."""

import dataclasses
import json
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
import teacher_model
import teacher_training
import train_demo_teacher

from minipuzzle.data.packages import Document

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
TEACHER = Path(str(files("minipuzzle.demo"))) / "teacher"


def small_model(seed: int = 0) -> torch.nn.Module:
    model: torch.nn.Module = teacher_model.build(SMALL, seed=seed, device=torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def test_fast_forward_and_its_gradients_equal_the_stock_model() -> None:
    model = small_model()
    ids = torch.randint(SMALL.vocabulary, (2, 3 * teacher_model.CHUNK))
    fast = teacher_model.FastForward(model, SMALL, torch.float32, compiled=False)(ids)
    torch.autograd.backward(fast.mean())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logits = model(ids).logits[:, :-1]
    stock = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.autograd.backward(stock.mean())
    torch.testing.assert_close(fast.flatten(), stock, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)


def test_checkpoint_loads_in_the_stock_class(tmp_path: Path) -> None:
    model = small_model()
    tokenizer = teacher_corpus.train_tokenizer(
        [Document("a", "def f(x):\n    return x\n" * 9, "a")], vocabulary=300, sample=1000
    )
    teacher_corpus.save_tokenizer(tokenizer, tmp_path / "tokenizer", 128)
    teacher_model.save_checkpoint(model, SMALL, tmp_path / "tokenizer", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "M-M*"
    assert not {"layers_block_type", "num_experts_per_tok", "n_routed_experts"} & set(config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(value.bfloat16().float(), loaded.state_dict()[name]), name


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
    def document(name: str, seed: int) -> Document:
        lines = (f"value_{seed}_{i} = compute_something({i}, {seed})" for i in range(20))
        return Document(name, "\n".join(lines) + "\n", "p")

    unseen = document("optuna/x.py", 0)
    accept = teacher_corpus.Filter([unseen], teacher_corpus.Limits())
    reasons = [
        accept.reason_against(document("p/a.py", 1)),
        accept.reason_against(document("p/b.py", 1)),
        accept.reason_against(Document("p/c.py", document("", 1).text + "x = 1\n", "p")),
        accept.reason_against(Document("p/d.py", unseen.text + "x = 1\n", "p")),
        accept.reason_against(document("p/vendor/networkx/e.py", 2)),
        accept.reason_against(Document("p/f.py", "x = 0" * 1000, "p")),
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
