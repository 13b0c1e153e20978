import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from minipuzzle.data import packages, packing, sources
from minipuzzle.data.packages import Document
from minipuzzle.data.packing import blocks_fingerprint, byte_lengths, token_blocks
from minipuzzle.data.sources import documents, parse_hub_source, shuffled_documents
from minipuzzle.data.splits import Share, check_disjoint, shares
from minipuzzle.errors import UserError

SMALL = "python-packages:yaml"
END = "<|end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE of 400 tokens, trained on one package."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((d.text for d in documents(SMALL)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


# --- sources


def test_text_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"line {i} é\r\n" for i in range(3000))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    found = list(documents(str(path)))
    assert len(found) > 2
    assert "".join(d.text for d in found) == text
    assert all(d.text.endswith("\r\n") for d in found)


def test_jsonl_and_parquet_give_the_same_texts(tmp_path: Path) -> None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    texts = [f"text {i}\nü" for i in range(5)]
    jsonl = write_jsonl(tmp_path / "a.jsonl", texts)
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": [1] * 5}), parquet)
    assert [d.text for d in documents(jsonl)] == texts
    assert [d.text for d in documents(str(parquet))] == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', 'line 2: no field "text"'),
        ("a.jsonl", b"[1]\n", 'line 1: no field "text"'),
        ("a.jsonl", b"{\n", "line 1: not JSON"),
        ("a.parquet", b"no parquet", "not a parquet file"),
        ("a.csv", b"text\n", "unknown ending"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(documents(str(tmp_path / name)))


def test_parquet_without_text_column(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), path)
    with pytest.raises(UserError, match="it has content"):
        list(documents(str(path)))


def test_wrong_packages() -> None:
    with pytest.raises(UserError, match="names no package"):
        list(documents("python-packages: ,"))
    with pytest.raises(UserError, match="no-such-package"):
        list(documents("python-packages:no-such-package"))


def test_hub_names() -> None:
    assert parse_hub_source("o/n") == ("o/n", None, "train", "text")
    assert parse_hub_source("o/n/c:test:body") == ("o/n", "c", "test", "body")
    for wrong in ["o/n/c/d", "o/n::x", "o/n:a:b:c", "/x", ""]:
        with pytest.raises(UserError, match="unknown text source"):
            parse_hub_source(wrong)


def test_hub_dataset_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Fake:
        @staticmethod
        def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
            calls.append((name, config, split, streaming))
            return iter([{"body": "a"}, {"body": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert [d.text for d in documents("o/n/c:test:body")] == ["a", "b"]
    assert calls == [("o/n", "c", "test", True)]
    with pytest.raises(UserError, match="no text column 'text' .it has body"):
        list(documents("o/n"))


def test_missing_library_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        list(documents("o/n"))


def test_shuffle_holds_every_document_once_and_depends_on_the_seed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [str(i) for i in range(50)])
    plain = [d.text for d in documents(source)]
    first, second = ([d.text for d in shuffled_documents(source, seed)] for seed in (0, 1))
    assert sorted(first) == sorted(second) == sorted(plain)
    assert first != second and first != plain
    assert first == [d.text for d in shuffled_documents(source, 0)]


def test_shuffle_of_packages_does_not_depend_on_the_listing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = list(shuffled_documents(SMALL, 3))
    listed = packages.source_files("yaml")
    monkeypatch.setattr(sources, "source_files", lambda _: listed[::-1])
    assert list(shuffled_documents(SMALL, 3)) == expected


def test_pools_bound_the_shuffle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "POOL_DOCUMENTS", 10)
    source = write_jsonl(tmp_path / "a.jsonl", [str(i) for i in range(25)])
    order = [int(d.text) for d in shuffled_documents(source, 0)]
    assert [sorted(order[i : i + 10]) for i in (0, 10, 20)] == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 25)),
    ]


# --- packing


def test_blocks_are_the_windows_joined_by_end_of_text(tmp_path: Path, tokenizer: Any) -> None:
    source = write_jsonl(
        tmp_path / "a.jsonl", [f"def f{i}():\n    return {i}\n" for i in range(40)]
    )
    ids = token_blocks(source, tokenizer, block=16, blocks=8, seed=0)
    assert ids.shape == (8, 16) and ids.dtype == torch.int64
    joined = "".join(d.text + END for d in shuffled_documents(source, 0))
    assert tokenizer.decode(ids.flatten()) == joined[: len(tokenizer.decode(ids.flatten()))]
    assert torch.equal(ids, token_blocks(source, tokenizer, block=16, blocks=8, seed=0))
    assert not torch.equal(ids, token_blocks(source, tokenizer, block=16, blocks=8, seed=1))


def test_fewer_blocks_are_the_beginning_of_more(tokenizer: Any) -> None:
    more = token_blocks(SMALL, tokenizer, block=32, blocks=20, seed=0)
    fewer = token_blocks(SMALL, tokenizer, block=32, blocks=5, seed=0)
    assert torch.equal(more[:5], fewer)


def test_a_long_document_does_not_fill_everything(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["long = 1\n" * 20_000] + [f"short{i} = {i}\n" for i in range(20)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    for seed in range(3):
        ids = token_blocks(source, tokenizer, block=64, blocks=9, seed=seed)
        text = tokenizer.decode(ids.flatten())
        # Every short document is there before the long one has its second turn.
        assert all(f"short{i} = {i}\n" in text for i in range(20))


def test_whole_text_is_used_before_there_is_too_little(tmp_path: Path, tokenizer: Any) -> None:
    text = "".join(f"value_{i} = {i * 7}\n" for i in range(2000))
    source = write_jsonl(tmp_path / "a.jsonl", [text])
    total = len(tokenizer(text)["input_ids"])
    blocks = int(total * 0.98) // 16
    assert token_blocks(source, tokenizer, block=16, blocks=blocks, seed=0).shape == (blocks, 16)
    with pytest.raises(UserError, match=r"holds \d+,\d+ tokens, 99999 blocks of 16 need 1,599,984"):
        token_blocks(source, tokenizer, block=16, blocks=99_999, seed=0)


def test_only_as_many_files_are_read_as_needed(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counting(path: Path) -> str | None:
        read.append(path)
        return packages.read_source(path)

    monkeypatch.setattr(sources, "read_source", counting)
    token_blocks("python-packages:stdlib", tokenizer, block=64, blocks=4, seed=0)
    assert 0 < len(read) < 20


def test_tokenizer_without_end_of_text(tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-text token"):
        token_blocks(SMALL, bare, block=8, blocks=1, seed=0)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab\né", max_size=80), st.integers(1, 20))
def test_windows_partition_the_document(text: str, size: int) -> None:
    cuts = packing._cuts(text, size)
    parts = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    assert "".join(parts) == text
    assert all(0 < len(part) <= size for part in parts) or not text
    for part in parts[:-1]:
        assert part.endswith("\n") or "\n" not in part
    document = Document("d", text, "g")
    given_windows = [packing._window(document, 0, turn, size) for turn in range(len(parts))]
    assert sorted(map(str, given_windows)) == sorted(parts)
    assert packing._window(document, 0, len(parts), size) is None


def test_fingerprint_sees_values_order_and_shape() -> None:
    ids = torch.arange(6).reshape(2, 3)
    prints = {blocks_fingerprint(x) for x in (ids, ids.flip(0), ids.reshape(3, 2), ids + 1)}
    assert len(prints) == 4
    assert blocks_fingerprint(ids) == blocks_fingerprint(ids.to(torch.int32).clone())


def test_byte_lengths_add_up_to_the_text(tokenizer: Any) -> None:
    text = "".join(d.text for d in documents(SMALL)) + "é漢字🙂\t\n"
    ids = torch.tensor(tokenizer(text)["input_ids"])
    lengths = byte_lengths(tokenizer, vocabulary=512)
    assert lengths.shape == (512,)
    assert lengths[ids].sum().item() == len(text.encode())
    assert lengths[tokenizer.eos_token_id] == 0 and lengths[len(tokenizer) :].sum() == 0
    # The reference that never trusts the alphabet: decode every token of an ASCII text by itself.
    plain = tokenizer("def f(x):\n    return x + 1\n")["input_ids"]
    assert lengths[plain].tolist() == [len(tokenizer.decode([i]).encode()) for i in plain]


def test_byte_lengths_of_sentencepiece_like_tokenizers() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(["<s>", "a", "▁", "▁a", "é", "<0x0A>", "aa"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("a", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")
    assert byte_lengths(spaced, 8).tolist() == [0, 1, 1, 2, 2, 1, 2, 0]


# --- splits


def test_sources_that_differ_stay_whole() -> None:
    divided = shares({"search": SMALL, "report": "python-packages:jinja2"})
    assert divided == {"search": Share(), "report": Share()}


def test_one_package_in_two_splits_is_divided(tokenizer: Any) -> None:
    names = {"calibration": "python-packages:PyYAML", "search": f"{SMALL},jinja2"}
    names["report"] = "python-packages:mpmath"
    divided = shares(names)
    assert divided["calibration"] == Share(0, 2) and divided["search"] == Share(1, 2)
    assert divided["report"] == Share()
    held = {
        name: {d.text for d in documents(names[name]) if divided[name].holds(d)} for name in names
    }
    assert held["calibration"] and held["search"] and held["calibration"].isdisjoint(held["search"])
    check_disjoint(names)
    ids = token_blocks(SMALL, tokenizer, block=32, blocks=40, seed=0, split=divided["calibration"])
    assert not torch.equal(ids, token_blocks(SMALL, tokenizer, block=32, blocks=40, seed=0))


def test_circles_join_through_a_third(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", ["x"]) for i in range(2)]
    assert shares({"a": paths[0], "b": paths[1], "c": paths[0]}) == {
        "a": Share(0, 2),
        "b": Share(0, 1),
        "c": Share(1, 2),
    }
    assert shares({"a": "o/n:train", "b": "o/n:test", "c": "o/m"}) == {
        "a": Share(0, 2),
        "b": Share(1, 2),
        "c": Share(),
    }
    linked = shares({"a": SMALL, "b": "python-packages:jinja2", "c": f"{SMALL},jinja2"})
    assert linked == {name: Share(i, 3) for i, name in enumerate("abc")}


def test_the_same_text_in_two_files_is_found(tmp_path: Path) -> None:
    texts = ["x = 1\n" * 100, "y = 2\n" * 100]
    one = write_jsonl(tmp_path / "1.jsonl", texts)
    two = write_jsonl(tmp_path / "2.jsonl", texts[1:])
    with pytest.raises(UserError, match="'a' and 'b' hold the same text"):
        check_disjoint({"a": one, "b": two})
    check_disjoint({"a": one, "b": one})


def test_share_checks_its_values() -> None:
    with pytest.raises(ValueError, match="0 <= index < of"):
        Share(2, 2)


def test_order_and_shares_do_not_depend_on_the_process() -> None:
    program = (
        "from minipuzzle.data.sources import shuffled_documents as s\n"
        "from minipuzzle.data.splits import Share\n"
        f"print([(d.name, Share(0, 2).holds(d)) for d in s({SMALL!r}, 5)])"
    )
    outputs: Iterator[str] = (
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    )
    assert len(set(outputs)) == 1
