"""Documents to blocks of token ids, reading and tokenising no more than the blocks need."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch

from minipuzzle.data.packages import Document
from minipuzzle.data.sources import order_key, shuffled_documents
from minipuzzle.data.splits import Share
from minipuzzle.errors import UserError

CHARACTERS_PER_TOKEN = 3
"""Low for large vocabularies, about right for the demo's; sets how much of a document is read."""
BLOCKS_PER_DOCUMENT = 2
"""A document gives at most about this many blocks before all others have had their turn."""
BATCH = 64
"""Texts tokenised in one call."""


def token_blocks(
    source: str,
    tokenizer: Any,
    *,
    block: int,
    blocks: int,
    seed: int,
    split: Share | None = None,
) -> torch.Tensor:
    """Pack documents into full blocks: deterministic by seed, many documents in few blocks.

    Documents come in an order given by hashes of the seed and their names. Each gives one window
    of about `BLOCKS_PER_DOCUMENT` blocks, cut at line ends, which window being up to the seed; if
    that does not fill the blocks, every document gives its next window, until the source is used
    up. After each window stands the end-of-text token, and a block may begin inside a window.

    Args:
        source: a source string, see `minipuzzle.data.sources`.
        tokenizer: a transformers tokenizer with an end-of-text token.
        block: tokens per block, T.
        blocks: number of blocks, N.
        seed: decides order and windows.
        split: the share of the documents that may be used; None for all.

    Returns:
        int64 token ids, shape (N, T).

    Raises:
        UserError: the source cannot be read, holds too few tokens, or the tokenizer has no
            end-of-text token.
    """
    if block < 1 or blocks < 1:
        raise ValueError(f"`block >= 1` and `blocks >= 1` must hold, but got {block}, {blocks}")
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no end-of-text token; add one to tokenizer_config.json")
    need = block * blocks
    ids: list[int] = []
    texts = _windows(source, seed, split or Share(), block)
    while batch := list(itertools.islice(texts, _batch_size(need - len(ids), block))):
        for tokens in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            ids += [*tokens, end]
        if len(ids) >= need:
            return torch.tensor(ids[:need], dtype=torch.int64).reshape(blocks, block)
    raise UserError(
        f"source {source} holds {len(ids):,} tokens, {blocks} blocks of {block} need {need:,}; "
        "ask for fewer blocks or give more text"
    )


def blocks_fingerprint(ids: torch.Tensor) -> str:
    """Hash of token ids and their shape, for the inputs of the stages that read them."""
    digest = hashlib.sha256(json.dumps(list(ids.shape)).encode())
    digest.update(ids.to(torch.int64).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def byte_lengths(tokenizer: Any, vocabulary: int) -> torch.Tensor:
    """Bytes of text that each token id stands for: what turns nats per token into bits per byte.

    Bits per byte of a sequence of T tokens = nats of tokens 1 .. T-1 that stand for text, / ln 2,
    / bytes of the same tokens. The first token is predicted from nothing and not counted. Special
    tokens (the end-of-text between documents) have length 0: leave them out of the nats too, with
    `byte_lengths(...)[ids] > 0`, because they are this packing's and not the text's.

    Args:
        tokenizer: a transformers tokenizer.
        vocabulary: rows of the embedding, V; ids the tokenizer does not know get 0.

    Returns:
        int64 lengths, shape (V,). Exact for byte-level BPE, where a token's every character is one
        byte; for others the length of the token decoded behind another one, which is exact but for
        tokens that are parts of one character.
    """
    special = set(tokenizer.all_special_ids)
    known = [i for i in range(min(vocabulary, len(tokenizer))) if i not in special]
    names = tokenizer.convert_ids_to_tokens(known)
    added = {str(token) for token in tokenizer.get_added_vocab()}
    byte_level = _is_byte_level(tokenizer)
    lengths = torch.zeros(vocabulary, dtype=torch.int64)
    for index, name in zip(known, names, strict=True):
        if name is None:
            continue
        if name in added:
            lengths[index] = len(name.encode())
        else:
            lengths[index] = len(name) if byte_level else _decoded_bytes(tokenizer, index, name)
    return lengths


def _windows(source: str, seed: int, share: Share, block: int) -> Iterator[str]:
    size = block * BLOCKS_PER_DOCUMENT * CHARACTERS_PER_TOKEN
    for turn in itertools.count():
        given = 0
        for document in shuffled_documents(source, seed):
            if not share.holds(document):
                continue
            window = _window(document, seed, turn, size)
            if window is not None:
                given += 1
                yield window
        if not given:
            return


def _window(document: Document, seed: int, turn: int, size: int) -> str | None:
    """The document's window of this turn, None when all were given."""
    cuts = _cuts(document.text, size)
    count = len(cuts) - 1
    if turn >= count:
        return None
    key = order_key(seed, "window", document.group, document.name)
    index = (int.from_bytes(key[:8], "little") + turn) % count
    return document.text[cuts[index] : cuts[index + 1]]


def _cuts(text: str, size: int) -> list[int]:
    """Where windows of at most `size` characters begin and end, at line ends where there are any.

    The first and last entries are 0 and the length of the text.
    """
    cuts = [0]
    while len(text) - cuts[-1] > size:
        line_end = text.rfind("\n", cuts[-1], cuts[-1] + size)
        cuts.append(line_end + 1 if line_end >= 0 else cuts[-1] + size)
    return [*cuts, len(text)]


def _batch_size(missing: int, block: int) -> int:
    """Texts to tokenise next: about as many as are missing, so that little is thrown away."""
    return max(1, min(BATCH, missing // (block * BLOCKS_PER_DOCUMENT) + 1))


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    state = json.loads(backend.to_str())
    return '"ByteLevel"' in json.dumps([state["decoder"], state["pre_tokenizer"]])


def _decoded_bytes(tokenizer: Any, index: int, name: str) -> int:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return 1  # SentencePiece's spelling of a single byte
    # Alone, a token that begins a word loses its space: decode it behind another one.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    after = tokenizer.decode([*anchor, index], clean_up_tokenization_spaces=False)
    return len(after.encode()) - len(before.encode())
