"""Cutting attention maps into blocks of rows that leave out what padding, causality and a sliding window leave out."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Block:
    """Rows and columns of the maps of a few samples, in positions of their group's span.

    Args:
        queries, keys (`slice`): R rows and the C columns that they can reach.
        shut (`list[tuple[int, Tensor]]`): Entries to leave out: first column of a part of the block, and bool of
            [R, columns of the part] or [samples, 1, R, C].
        real (`Tensor`, *optional*): [samples, R] of bool, which queries are real tokens; all if left out.
    """

    queries: slice
    keys: slice
    shut: list[tuple[int, Tensor]]
    real: Tensor | None


@dataclass
class Group:
    """Samples that are computed together, and the positions from their first real token to their last."""

    samples: slice
    span: slice
    blocks: list[Block]

    @property
    def size(self) -> int:
        return self.samples.stop - self.samples.start


class BlockPlan:
    """How the maps of a batch are cut.

    Args:
        attention_mask (`Tensor`): [B, T], nonzero for real tokens. Its device is waited for, once.
        entries (`int`): Most entries of a block's map, [samples, heads, rows, keys] (a single row may have more).
    """

    def __init__(self, attention_mask: Tensor, entries: int):
        self.real = attention_mask.bool()
        self.entries = entries
        length = self.real.shape[1]
        first, last = self.real.int().argmax(dim=1), length - self.real.flip(1).int().argmax(dim=1)
        table = torch.stack([first, last, self.real.sum(dim=1)], dim=1).tolist()
        self._spans = [(first, last, tokens) if tokens else (0, 0, 0) for first, last, tokens in table]

    def valid_entries(self, back: int, ahead: int) -> Tensor:
        """[B], entries of a map whose query and key are real tokens, the key from `back` before to `ahead` after."""
        length = self.real.shape[1]
        position = torch.arange(length, device=self.real.device)
        tokens_before = F.pad(self.real.cumsum(dim=1), (1, 0))
        stop, start = (position + ahead + 1).clamp(max=length), (position - back).clamp(min=0)
        return ((tokens_before[:, stop] - tokens_before[:, start]) * self.real).sum(dim=1)

    def groups(self, heads: int, back: int, ahead: int) -> Iterator[Group]:
        """Cuts maps of so many heads, in which a query sees `back` keys before its own and `ahead` after it."""
        batch, length = self.real.shape
        size = max(1, self.entries // (heads * length * length))
        for start in range(0, batch, size):
            samples = slice(start, min(start + size, batch))
            spans = self._spans[samples]
            span = slice(min(first for first, _, _ in spans), max(last for _, last, _ in spans))
            if span.start == span.stop:
                continue
            padded = any(span.stop - span.start != tokens for _, _, tokens in spans)
            entries = max(1, self.entries // (heads * len(spans)))
            yield Group(samples, span, list(self._blocks(samples, span, padded, entries, back, ahead)))

    def _blocks(
        self, samples: slice, span: slice, padded: bool, entries: int, back: int, ahead: int
    ) -> Iterator[Block]:
        real = self.real[samples, span]
        length = span.stop - span.start
        rows = min(length, math.isqrt(entries), max(1, entries // min(length, back + ahead + 1)))
        position = torch.arange(length, device=real.device)
        for start in range(0, length, rows):
            queries = slice(start, min(start + rows, length))
            keys = slice(max(0, queries.start - back), min(length, queries.stop + ahead))
            query = position[queries, None]
            shut = []
            # Only the block's corners are out of reach of some of its rows.
            if (late := queries.start + ahead + 1) < keys.stop:
                shut.append((late - keys.start, position[late : keys.stop] > query + ahead))
            if (early := queries.stop - 1 - back) > keys.start:
                shut.append((0, position[keys.start : early] < query - back))
            if padded:
                shut.append((0, ~(real[:, None, queries, None] & real[:, None, None, keys])))
            yield Block(queries, keys, shut, real[:, queries] if padded else None)
