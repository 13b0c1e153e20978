"""The demo teacher's text: which files of which packages, its tokenizer, and its tokens on disk.

The packages are named in a requirements file; `networkx`, `sqlalchemy`, `optuna` and `mpmath` are
kept out of the training text (by path and by the lines they consist of) because the demo's search
and report splits are made of them.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minipuzzle.data.packages import (
    Document,
    package_version,
    python_package_documents,
)

SEARCH_PACKAGES = ("optuna", "mpmath")
REPORT_PACKAGES = ("networkx", "sqlalchemy")
UNSEEN_PACKAGES = SEARCH_PACKAGES + REPORT_PACKAGES

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"

_LONG_LINE = 30
"""Shorter lines (`return None`) say nothing about where they come from."""


@dataclass(frozen=True)
class Limits:
    """What is left out of the training text.

    Attributes:
        package_bytes: text taken of one package at most, so that none dominates.
        test_share: share of `package_bytes` that test files may fill.
        line_characters: a file with a longer line is generated or minified.
        overlap: a file with this share of its long lines in an unseen package is a copy.
        repeated: a file with this share of its long lines in files taken before is a near-copy.
    """

    package_bytes: int = 8_000_000
    test_share: float = 0.2
    line_characters: int = 1_000
    overlap: float = 0.3
    repeated: float = 0.7


@dataclass
class PackageCount:
    """What was read of one package, and why the rest was not."""

    name: str
    version: str | None
    files: int = 0
    bytes: int = 0
    tokens: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


def read_requirements(path: Path) -> list[str]:
    """Package names of a requirements file, in its order, without versions and comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line.split("==")[0].strip() for line in lines if line]


class Filter:
    """Decides file by file what enters the training text; remembers what it has taken."""

    def __init__(self, unseen: Iterable[Document], limits: Limits) -> None:
        self.limits = limits
        self._unseen_lines = {line for document in unseen for line in _long_lines(document.text)}
        self._contents: set[bytes] = set()
        self._lines: set[int] = set()

    def reason_against(self, document: Document) -> str | None:
        """Why a document is left out, or None when it is taken."""
        parts = [part.removesuffix(".py") for part in PurePosixPath(document.name).parts]
        if not set(UNSEEN_PACKAGES).isdisjoint(parts):
            return "path of an unseen package"
        if max(map(len, document.text.splitlines()), default=0) > self.limits.line_characters:
            return "very long lines"
        if self._seen_content(document.text):
            return "same content as another file"
        lines = _long_lines(document.text)
        if _share(line in self._unseen_lines for line in lines) > self.limits.overlap:
            return "lines of an unseen package"
        hashes = [hash(line) for line in lines]
        if _share(value in self._lines for value in hashes) > self.limits.repeated:
            return "nearly the same as other files"
        self._lines.update(hashes)
        return None

    def _seen_content(self, text: str) -> bool:
        digest = hashlib.sha256("".join(text.split()).encode()).digest()
        if digest in self._contents:
            return True
        self._contents.add(digest)
        return False


def training_documents(
    packages: Sequence[str], limits: Limits
) -> tuple[list[Document], list[PackageCount]]:
    """Documents of all packages after filtering, package after package, and what was left out."""
    accept = Filter(python_package_documents(UNSEEN_PACKAGES), limits)
    taken: list[Document] = []
    counts: list[PackageCount] = []
    for package in packages:
        count = PackageCount(package, package_version(package))
        taken.extend(_package_share(package, accept, count))
        counts.append(count)
    return taken, counts


def _package_share(package: str, accept: Filter, count: PackageCount) -> Iterator[Document]:
    """Files of one package in an order drawn from their names, until its share is full."""
    documents = sorted(python_package_documents([package]), key=lambda d: _order(d.name))
    room = accept.limits.package_bytes
    test_room = int(room * accept.limits.test_share)
    for document in documents:
        size = len(document.text.encode())
        is_test = _is_test(document.name)
        if size > room or (is_test and size > test_room):
            reason: str | None = "share of the package is full"
        else:
            reason = accept.reason_against(document)
        if reason is not None:
            count.left_out[reason] = count.left_out.get(reason, 0) + 1
            continue
        room, test_room = room - size, test_room - size * is_test
        count.files, count.bytes = count.files + 1, count.bytes + size
        yield document


def _is_test(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(part in {"test", "tests", "testing"} for part in parts[:-1]) or (
        parts[-1].startswith(("test_", "conftest")) or parts[-1].endswith("_test.py")
    )


def _order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _long_lines(text: str) -> list[str]:
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if len(line) >= _LONG_LINE]


def _share(hits: Iterable[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values) if len(values) >= 5 else 0.0


def train_tokenizer(documents: Sequence[Document], *, vocabulary: int, sample: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's splitting, trained on about `sample` bytes of the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents, sample), trainer)
    return tokenizer


def _sample(documents: Sequence[Document], size: int) -> list[str]:
    chosen: list[str] = []
    total = 0
    for document in sorted(documents, key=lambda d: _order("tokenizer/" + d.name)):
        if total >= size:
            break
        chosen.append(document.text)
        total += len(document.text)
    return chosen


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and the small files by which `AutoTokenizer` finds eos and padding."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": END_OF_TEXT, "pad_token": PADDING}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **names,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", names)


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """UTF-8 bytes each token stands for; 0 for the special ones."""
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(len(vocabulary), dtype=np.int64)
    for text, index in vocabulary.items():
        # In the byte-level alphabet one character is one byte.
        sizes[index] = 0 if text in (END_OF_TEXT, PADDING) else len(text)
    return sizes


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[NDArray[np.uint16]]:
    """Tokens of each document, an end-of-text token before each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded: list[NDArray[np.uint16]] = []
    for start in range(0, len(documents), 500):
        texts = [document.text for document in documents[start : start + 500]]
        for item in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            encoded.append(np.array([end, *item.ids], dtype=np.uint16))
    return encoded


def prepare(
    folder: Path, packages: Sequence[str], *, vocabulary: int, context: int, limits: Limits
) -> dict[str, Any]:
    """Write the tokenizer, `train.bin`, one `.bin` per unseen package, and `manifest.json`.

    The `.bin` files are plain little-endian uint16 tokens, documents in a drawn order.
    """
    documents, counts = training_documents(packages, limits)
    tokenizer = train_tokenizer(documents, vocabulary=vocabulary, sample=60_000_000)
    save_tokenizer(tokenizer, folder / "tokenizer", context)
    encoded = encode(tokenizer, documents)
    by_name = {count.name: count for count in counts}
    for document, tokens in zip(documents, encoded, strict=True):
        by_name[document.group].tokens += len(tokens)
    random.Random(0).shuffle(encoded)
    np.concatenate(encoded).tofile(folder / "train.bin")
    unseen = [_write_unseen(folder, tokenizer, package) for package in UNSEEN_PACKAGES]
    np.save(folder / "token_bytes.npy", token_bytes(tokenizer))
    manifest = _manifest(counts, unseen, limits)
    write_json(folder / "manifest.json", manifest)
    return manifest


def _write_unseen(folder: Path, tokenizer: Tokenizer, package: str) -> PackageCount:
    documents = list(python_package_documents([package]))
    tokens = np.concatenate(encode(tokenizer, documents))
    tokens.tofile(folder / f"{package}.bin")
    size = sum(len(document.text.encode()) for document in documents)
    return PackageCount(package, package_version(package), len(documents), size, len(tokens))


def _manifest(
    counts: Sequence[PackageCount], unseen: Sequence[PackageCount], limits: Limits
) -> dict[str, Any]:
    return {
        "limits": asdict(limits),
        "files": sum(count.files for count in counts),
        "bytes": sum(count.bytes for count in counts),
        "tokens": sum(count.tokens for count in counts),
        "packages": [asdict(count) for count in counts],
        "unseen": [asdict(count) for count in unseen],
    }


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a newline at the end."""
    path.write_text(json.dumps(value, indent=1) + "\n")
