"""The demo teacher's tokenizer: trained on a sample of its text, or that of another model."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def train_tokenizer(texts: Iterable[str], *, vocabulary: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's splitting."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


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


def copy_tokenizer(source: Path, folder: Path, *, vocabulary: int) -> Tokenizer:
    """Take the tokenizer of a model folder that this script wrote.

    Raises:
        ValueError: it has more than `vocabulary` tokens, or other special ones.
    """
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    special = [tokenizer.token_to_id(token) for token in (END_OF_TEXT, PADDING)]
    if special != [0, 1] or tokenizer.get_vocab_size() > vocabulary:
        raise ValueError(f"{source}: not a tokenizer of at most {vocabulary} tokens of this script")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(source / name, folder / name)
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """UTF-8 bytes each token stands for; 0 for the special ones."""
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(len(vocabulary), dtype=np.int64)
    for text, index in vocabulary.items():
        # In the byte-level alphabet one character is one byte.
        sizes[index] = 0 if text in (END_OF_TEXT, PADDING) else len(text)
    return sizes


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.uint16]]:
    """Tokens of each text, an end-of-text token before each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    items = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array([end, *item.ids], dtype=np.uint16) for item in items]


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a newline at the end."""
    path.write_text(json.dumps(value, indent=1) + "\n")
