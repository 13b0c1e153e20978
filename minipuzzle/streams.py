"""Hidden states of many sequences on their way through the layers, in chunks a layer takes at once.

Where the model itself is too large for a GPU, the states wait in page-locked host memory: while a
layer works on one chunk, the next one is copied to the device and the one before back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch


class Stream:
    """Hidden states (B, T, D) in chunks of rows.

    `waiting` streams keep their chunks in host memory and hand them out on `device`.
    """

    def __init__(
        self, chunks: Sequence[torch.Tensor], device: torch.device, *, waiting: bool
    ) -> None:
        self.device = device
        self.waiting = waiting and device.type == "cuda"
        self._chunks = [self._keep(chunk) for chunk in chunks]

    def _keep(self, chunk: torch.Tensor) -> torch.Tensor:
        if not self.waiting:
            return chunk
        kept = torch.empty(chunk.shape, dtype=chunk.dtype, pin_memory=True)
        return kept.copy_(chunk)

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Every chunk on the device, the next one already on its way."""
        if not self.waiting:
            yield from self._chunks
            return
        copies = _side_stream(self.device, "in")
        ahead = self._fetch(0, copies) if self._chunks else None
        for k in range(len(self._chunks)):
            assert ahead is not None
            chunk, there = ahead
            ahead = self._fetch(k + 1, copies) if k + 1 < len(self._chunks) else None
            torch.cuda.current_stream(self.device).wait_event(there)
            chunk.record_stream(torch.cuda.current_stream(self.device))
            yield chunk

    def _fetch(self, k: int, copies: torch.cuda.Stream) -> tuple[torch.Tensor, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            chunk = self._chunks[k].to(self.device, non_blocking=True)
            there = copies.record_event()
        return chunk, there

    def advance(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every chunk by what the function makes of it (same shape)."""
        if not self.waiting:
            for k, chunk in enumerate(self._chunks):  # old and new states never all at once
                self._chunks[k] = function(chunk)
            return
        back = _side_stream(self.device, "out")
        for k, chunk in enumerate(self):
            result = function(chunk)
            back.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(back):
                self._chunks[k].copy_(result, non_blocking=True)
            result.record_stream(back)
        back.synchronize()

    def extend(self, other: Stream) -> None:
        """Take the chunks of another stream, which must not be advanced any more, behind ours."""
        assert self.waiting == other.waiting
        self._chunks.extend(other._chunks)

    def sizes(self) -> list[int]:
        """Tokens of every chunk."""
        return [chunk.shape[0] * chunk.shape[1] for chunk in self._chunks]

    def tokens(self, k: int, start: int, stop: int) -> torch.Tensor:
        """Tokens `start` to `stop` of chunk k, sequences laid end to end: (N, D) on the device."""
        return self._chunks[k].flatten(0, 1)[start:stop].to(self.device)

    def copy(self) -> Stream:
        """Independent states of the same values."""
        twin = Stream([], self.device, waiting=self.waiting)
        twin._chunks = [
            torch.empty(c.shape, dtype=c.dtype, pin_memory=True).copy_(c) if self.waiting else c
            for c in self._chunks
        ]
        return twin


@cache
def _side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """A queue of the GPU beside the one that computes; the same one every time.

    The allocator keeps the freed memory of every queue for itself: ever new ones would hoard it.
    """
    queue: Any = torch.cuda.Stream
    side: torch.cuda.Stream = queue(device)
    return side
