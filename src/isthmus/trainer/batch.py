"""Documents packed into rows. Shapes: B rows, T tokens per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.data.corpus import Document

ROW_LENGTH = 96
"""Tokens of a packed row, unless a document is longer: short rows waste little attention on other documents."""


@dataclass(frozen=True)
class Batch:
    """Packed rows, all [B, T]. Padding has document -1 and is never a target.

    `document` numbers the documents in the order in which they were given; attention stays within one.
    `target_mask` is true where a token is to be predicted from the ones before it.
    """

    tokens: Tensor
    positions: Tensor
    document: Tensor
    target_mask: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(tensor.to(device) for tensor in (self.tokens, self.positions, self.document, self.target_mask)))

    @property
    def num_tokens(self) -> int:
        return int((self.document >= 0).sum())


def pack(documents: Sequence[Document], row_length: int | None = None) -> Batch:
    """Place documents into as few rows as first-fit-decreasing finds; rows are cut to the fullest one.

    A row has ROW_LENGTH tokens, or as many as the longest document, unless `row_length` is given. Raises ValueError if
    a document is longer than that.
    """
    if row_length is None:
        row_length = max(ROW_LENGTH, max(len(document.tokens) for document in documents))
    rows: list[list[int]] = []
    used: list[int] = []
    for index in sorted(range(len(documents)), key=lambda i: -len(documents[i].tokens)):
        length = len(documents[index].tokens)
        if length > row_length:
            raise ValueError(f"a document of {length} tokens does not fit into a row of {row_length}")
        row = next((r for r, filled in enumerate(used) if filled + length <= row_length), None)
        if row is None:
            rows.append([])
            used.append(0)
            row = len(rows) - 1
        rows[row].append(index)
        used[row] += length
    return _fill(documents, rows, max(used))


def _fill(documents: Sequence[Document], rows: list[list[int]], width: int) -> Batch:
    shape = (len(rows), width)
    tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    document = torch.full(shape, -1, dtype=torch.long)
    target_mask = torch.zeros(shape, dtype=torch.bool)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            item = documents[index]
            end = start + len(item.tokens)
            tokens[row, start:end] = torch.tensor(item.tokens)
            positions[row, start:end] = torch.arange(end - start)
            document[row, start:end] = index
            target_mask[row, start + item.prompt_length : end] = True
            start = end
    return Batch(tokens, positions, document, target_mask)
