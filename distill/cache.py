"""A teacher's distributions on disk: written once, read by every student of the same blocks.

Letters: B blocks, T tokens of a block, V vocabulary, P pairs of id and count.

A folder of safetensors shards, each of some blocks, renamed into place when whole, so a killed
writer goes on with the next shard. Every shard's header says of what it is; see `identity`.

- `sampled` (RS-KD, arXiv:2503.16870): `draws` ids a token, with replacement, from the teacher's
  distribution, as unique ids and counts. A pair is one little-endian word, id x 2^c + count - 1,
  of as few bytes as vocabulary and draws need: 3 up to V = 2^18 with 50 draws. The counts of a
  token add up to `draws`, which is what separates tokens.
- `topk`: the `top` likeliest ids of a token and their probabilities in fp16; ids in 2 bytes up to
  V = 2^16, 3 beyond.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from minipuzzle import progress
from minipuzzle.data.packing import blocks_fingerprint
from minipuzzle.errors import UserError
from minipuzzle.files import TEMPORARY, disk_full_is_a_user_error, list_files, require_disk

from .loss import DEFAULT_CHUNK
from .sparse import sampled_cross_entropy, topk_kl
from .teacher import Teacher

SCHEMA_VERSION = 1
KINDS = ("sampled", "topk")
SHARD_TOKENS = 2**17  # what a kill may cost: 4 s of an 8B teacher on a GPU, 30 s of the demo's
BATCH = 8  # blocks the teacher runs on at once
NAME = "teacher-{:05d}.safetensors"

Identity = dict[str, Any]


def identity(
    kind: str, size: int, teacher: str, vocabulary: int, blocks: Tensor, seed: int = 0
) -> Identity:
    """All that a cache depends on, as it stands in every shard's header.

    Args:
        kind: `sampled` or `topk`.
        size: draws, or ids kept, of a token.
        teacher: fingerprint of its checkpoint.
        vocabulary: V, rows of its head.
        blocks: (B, T) token ids. Data, packing and tokenizer are what made these ids.
        seed: of the draws.

    Raises:
        UserError: an unknown kind, or a size out of range.
    """
    if kind not in KINDS:
        raise UserError(f"a cache of kind {kind} is unknown; take one of {', '.join(KINDS)}")
    most = vocabulary if kind == "topk" else 2**15
    if not 1 <= size <= most:
        raise UserError(f"a {kind} cache can hold 1 to {most:,} ids a token, not {size:,}")
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "size": size,
        "teacher": teacher,
        "vocabulary": vocabulary,
        "blocks": [*blocks.shape, blocks_fingerprint(blocks)],
        "seed": seed if kind == "sampled" else None,
    }


def write_cache(folder: Path, teacher: Teacher, blocks: Tensor, made_of: Identity) -> Path:
    """Write the shards that are not in `folder` yet; returns the folder.

    Args:
        folder: is made where it is not there.
        teacher: of `blocks`; asked for `BATCH` blocks at a time.
        blocks: (B, T) token ids.
        made_of: their `identity`.

    Raises:
        UserError: the folder holds a cache of something else, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(_shards(blocks)) if _missing(folder, number, made_of)]
    require_disk(folder, len(missing) * _shard_blocks(blocks) * _most_bytes(made_of, blocks))
    with disk_full_is_a_user_error(folder), progress.bar("cache", len(blocks), "blocks") as bar:
        bar.advance(len(blocks) - sum(len(_rows(blocks, number)) for number in missing))
        for number in missing:
            parts = []
            for rows in torch.split(torch.tensor(_rows(blocks, number)), BATCH):
                hidden = teacher.hidden(rows)
                parts += [
                    _block(hidden[i], teacher.head, int(row), made_of) for i, row in enumerate(rows)
                ]
                bar.advance(len(rows))
            _save(folder / NAME.format(number), parts, made_of | {"shard": number})
    return folder


class CachedTeacher:
    """Reads the rows a step asks for from the shards' files, memory-mapped; see `Targets`.

    Args:
        folder: what `write_cache` filled.
        blocks: (B, T), the blocks trained on.
        made_of: the `identity` the cache must have.

    Raises:
        UserError: a shard is missing, damaged, or of something else (named).
    """

    def __init__(self, folder: Path, blocks: Tensor, made_of: Identity) -> None:
        self._folder, self._made_of = folder, made_of
        self._length, self._per_shard = blocks.shape[1], _shard_blocks(blocks)
        for number in range(_shards(blocks)):
            if _missing(folder, number, made_of):
                raise UserError(
                    f"{folder / NAME.format(number)} is missing or damaged; "
                    f"write the cache again to fill the gap"
                )

    def loss(self, rows: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
        """Estimated KL(teacher || student), nats, mean over the tokens of blocks `rows`.

        For sampled ids: cross-entropy against the draws less the teacher's own on the same draws,
        so sum c/n (log p - log q): the KL without bias, and below 0 where chance has it so. For
        top-k the KL over k + 1 buckets, a lower bound.
        """
        ids, weights, own = self.targets(rows)
        ids, weights = ids.to(hidden.device), weights.to(hidden.device)
        if self._made_of["kind"] == "topk":
            return topk_kl(hidden, head, ids, weights)
        return sampled_cross_entropy(hidden, head, ids, weights) - own

    def targets(self, rows: Tensor) -> tuple[Tensor, Tensor, float]:
        """Ids and weights (B x T, K) of blocks `rows` (B,), and the teacher's mean cross-entropy.

        Weights are shares of the draws, filled up with zeros, or probabilities; the teacher's
        cross-entropy on its draws is 0 for top-k.
        """
        parts = [self._read(int(row)) for row in rows]
        all_ids, all_weights, own = zip(*parts, strict=True)
        return _side_by_side(all_ids), _side_by_side(all_weights), sum(own) / len(own)

    def _read(self, row: int) -> tuple[Tensor, Tensor, float]:
        number, place = divmod(row, self._per_shard)
        length = self._length
        with safe_open(self._folder / NAME.format(number), framework="pt") as file:
            if self._made_of["kind"] == "topk":
                part = slice(place * length, (place + 1) * length)
                ids = _from_bytes(file.get_slice("ids")[part])
                return ids, file.get_slice("probabilities")[part].float(), 0.0
            ends = [0, *file.get_tensor("ends").tolist()]
            words = _from_bytes(file.get_slice("pairs")[ends[place] : ends[place + 1]])
            own = float(file.get_slice("cross_entropy")[place : place + 1])
        return *_unpack_draws(words, self._made_of["size"], length), own


def bytes_per_token(folder: Path, blocks: Tensor) -> float:
    """Bytes of a cache's files, headers included, for each token of its blocks."""
    return sum(path.stat().st_size for path in list_files(folder)) / blocks.numel()


@torch.no_grad()
def _block(hidden: Tensor, head: Tensor, row: int, made_of: Identity) -> dict[str, Tensor]:
    """What is stored of block `row` from its states (T, E), made a chunk of tokens at a time."""
    chunks = (_log_probs(part, head) for part in torch.split(hidden, DEFAULT_CHUNK))
    if made_of["kind"] == "topk":
        return _top(chunks, made_of)
    # By block, so that a shard's draws do not depend on those before it.
    generator = torch.Generator(hidden.device).manual_seed(made_of["seed"] * 1_000_003 + row)
    return _drawn(chunks, made_of, len(hidden), generator)


def _log_probs(hidden: Tensor, head: Tensor) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.log_softmax(hidden @ head.T, dim=-1, dtype=wide)


def _top(chunks: Iterator[Tensor], made_of: Identity) -> dict[str, Tensor]:
    best = [chunk.topk(made_of["size"], dim=-1) for chunk in chunks]
    ids = torch.cat([indices for _, indices in best]).cpu()
    width = _width((made_of["vocabulary"] - 1).bit_length())
    values = torch.cat([values for values, _ in best]).exp().half().cpu()
    return {"ids": _to_bytes(ids, width), "probabilities": values}


def _drawn(
    chunks: Iterator[Tensor], made_of: Identity, tokens: int, generator: torch.Generator
) -> dict[str, Tensor]:
    draws, vocabulary = made_of["size"], made_of["vocabulary"]
    pairs, own = [], 0.0
    for log_probs in chunks:
        # In fp64: fp32's running sum over a large vocabulary would lose the smallest.
        drawn = torch.multinomial(
            log_probs.double().exp(), draws, replacement=True, generator=generator
        )
        own -= log_probs.gather(-1, drawn).sum(dtype=torch.float64).item()
        places = torch.arange(len(drawn), device=drawn.device)[:, None] * vocabulary
        keys, counts = torch.unique(places + drawn, return_counts=True)  # sorted: by token, id
        pairs.append(((keys % vocabulary) << _count_bits(draws) | (counts - 1)).cpu())
    words = torch.cat(pairs)
    width = _width((vocabulary - 1).bit_length() + _count_bits(draws))
    return {
        "pairs": _to_bytes(words, width),
        "ends": torch.tensor([len(words)]),
        "cross_entropy": torch.tensor([own / (draws * tokens)], dtype=torch.float64),
    }


def _unpack_draws(words: Tensor, draws: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and shares of the draws (T, K) from the words of a block."""
    bits = _count_bits(draws)
    counts = (words & (1 << bits) - 1) + 1
    token = (counts.cumsum(0) - counts) // draws
    starts = torch.searchsorted(token, torch.arange(tokens))
    place = torch.arange(len(words)) - starts[token]
    ids = torch.zeros(tokens, int(place.max()) + 1, dtype=torch.int64)
    weights = torch.zeros(ids.shape)
    ids[token, place] = words >> bits
    weights[token, place] = counts / draws
    return ids, weights


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Blocks of (T, K) with their own K to one (B x T, K), filled up with zeros."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])


def _count_bits(draws: int) -> int:
    return (draws - 1).bit_length()


def _width(bits: int) -> int:
    return -(-bits // 8) or 1


def _to_bytes(words: Tensor, width: int) -> Tensor:
    """Whole numbers to their `width` low bytes, in a new last dimension."""
    return (words[..., None] >> 8 * torch.arange(width)).bitwise_and_(255).to(torch.uint8)


def _from_bytes(values: Tensor) -> Tensor:
    """The other way round."""
    return (values.to(torch.int64) << 8 * torch.arange(values.shape[-1])).sum(-1)


def _shard_blocks(blocks: Tensor) -> int:
    return max(1, SHARD_TOKENS // blocks.shape[1])


def _shards(blocks: Tensor) -> int:
    return -(-len(blocks) // _shard_blocks(blocks))


def _rows(blocks: Tensor, number: int) -> range:
    per_shard = _shard_blocks(blocks)
    return range(number * per_shard, min(len(blocks), (number + 1) * per_shard))


def _most_bytes(made_of: Identity, blocks: Tensor) -> int:
    """Of a block; draws seldom differ as much as they could, so half of them are counted."""
    return blocks.shape[1] * int(made_of["size"]) * (5 if made_of["kind"] == "topk" else 2)


def _save(path: Path, parts: list[dict[str, Tensor]], header: Mapping[str, Any]) -> None:
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if "ends" in tensors:
        tensors["ends"] = tensors["ends"].cumsum(0)
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    save_file(tensors, temporary, metadata={"cache": json.dumps(header)})
    temporary.replace(path)


def _missing(folder: Path, number: int, made_of: Identity) -> bool:
    """Whether a shard is not there or not readable. UserError where it is of something else."""
    path = folder / NAME.format(number)
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["cache"])
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return True
    wanted = made_of | {"shard": number}
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        raise UserError(
            f"{path} is a cache of something else (other {', '.join(differing)}); "
            f"remove it or name another folder"
        )
    return False
