"""Documents packed into rows. Shapes: B rows, T tokens per row."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.data.corpus import Document
from isthmus.data.pretrain import Rows

ROW_LENGTH = 256
"""Tokens of a row that is part of a microbatch, about, unless a document is longer."""


@dataclass(frozen=True)
class Batch:
    """Packed rows, all [B, T]. Padding has document -1 and is never a target.

    `document` numbers the documents in the order in which they were given; attention stays within one.
    `target_mask` is true where a token is to be predicted from the ones before it.

    A document whose positions do not begin with 0 goes on with the prompt of the nearest one before it that does:
    tokens that both begin with are there once.
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

    @classmethod
    def empty(cls, length: int) -> Batch:
        """No rows."""
        numbers = torch.zeros(0, length, dtype=torch.long)
        return cls(numbers, numbers, numbers, numbers.bool())

    @property
    def mean_context(self) -> float:
        """Tokens that a token attends to on average, itself included; 0 without tokens."""
        real = self.document >= 0
        return (self.positions[real] + 1).float().mean().item() if real.any() else 0.0

    @property
    def num_documents(self) -> int:
        return int(self._starts.sum())

    @property
    def mtp_mask(self) -> Tensor:
        """[B, T - 2], true where token i + 2 is to be predicted from position i of the same document."""
        return (self.document[:, 2:] == self.document[:, :-2]) & self.target_mask[:, 2:]

    @property
    def sequence(self) -> Tensor:
        """[B, T]: the documents numbered from 0 in the order of the rows, -1 for padding."""
        numbers = self._starts.flatten().cumsum(0).view(self.tokens.shape) - 1
        return numbers.masked_fill(self.document < 0, -1)

    @property
    def mtp_sequence(self) -> Tensor:
        """`sequence` where the next token belongs to the same document, else -1: what multi-token prediction sees."""
        goes_on = F.pad(self.document[:, 1:] == self.document[:, :-1], (0, 1))
        return self.sequence.masked_fill(~goes_on, -1)

    @property
    def shares_prompts(self) -> bool:
        """Whether a document goes on with the prompt of another."""
        return bool((self._begins & (self.positions > 0)).any())

    @property
    def before(self) -> Tensor:
        """[B, T]: where the token before each one stands in the flattened rows; of a first one it means nothing."""
        place = torch.arange(self.tokens.numel(), device=self.tokens.device).view(self.tokens.shape)
        first = torch.where(self._starts, place, 0).flatten().cummax(0).values.view(place.shape)
        return torch.where(self._begins & (self.positions > 0), first + self.positions, place) - 1

    def counts(self) -> Tensor:
        """[4]: targets, targets of multi-token prediction, documents and tokens, in fp32."""
        counts = (self.target_mask[:, 1:].sum(), self.mtp_mask.sum(), self._starts.sum(), (self.document >= 0).sum())
        return torch.stack(counts).float()

    def select(self, rows: Sequence[int]) -> Batch:
        """Some of the rows."""
        index = torch.tensor(rows, dtype=torch.long)
        return Batch(*(tensor[index] for tensor in (self.tokens, self.positions, self.document, self.target_mask)))

    def with_rows(self, rows: int) -> Batch:
        """Filled up to `rows` rows with rows of padding."""
        missing = rows - len(self.tokens)
        if missing == 0:
            return self
        values = ((self.tokens, 0), (self.positions, 0), (self.document, -1), (self.target_mask, False))
        return Batch(*(F.pad(tensor, (0, 0, 0, missing), value=value) for tensor, value in values))

    @property
    def _starts(self) -> Tensor:
        return (self.positions == 0) & (self.document >= 0)

    @property
    def _begins(self) -> Tensor:
        """[B, T]: where another document begins than the one before it in the row."""
        begins = torch.ones_like(self.target_mask)
        begins[:, 1:] = self.document[:, 1:] != self.document[:, :-1]
        return begins & (self.document >= 0)


def pack(
    documents: Sequence[Document],
    row_length: int | None = None,
    multiple_of: int = 1,
    together: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Place documents into rows of about one length, which are as full as a greedy choice makes them.

    There are `multiple_of` rows; with a `row_length` as many times that as there are rows of about that many tokens, or
    of the longest document. The longest documents are placed first, each into the emptiest row (Graham, 1969).
    `together` lists, by their numbers, documents that lie side by side because they have one prompt, which is then
    there once; every document is in one list, and alone if there are none.
    """
    groups = [[index] for index in range(len(documents))] if together is None else together
    lengths = [_length(documents, group) for group in groups]
    filled = sum(lengths) // max(row_length, *lengths) if row_length else 1
    count = max(1, filled // multiple_of) * multiple_of
    rows: list[list[Sequence[int]]] = [[] for _ in range(count)]
    emptiest = [(0, row) for row in range(count)]
    for index in sorted(range(len(groups)), key=lambda i: -lengths[i]):
        filled, row = heapq.heappop(emptiest)
        rows[row].append(groups[index])
        heapq.heappush(emptiest, (filled + lengths[index], row))
    return _fill(documents, rows, max(filled for filled, _ in emptiest))


def _length(documents: Sequence[Document], group: Sequence[int]) -> int:
    """Tokens of documents with one prompt, which is there once."""
    shared = documents[group[0]].prompt_length * (len(group) - 1)
    return sum(len(documents[index].tokens) for index in group) - shared


def _fill(documents: Sequence[Document], rows: list[list[Sequence[int]]], width: int) -> Batch:
    shape = (len(rows), width)
    tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    document = torch.full(shape, -1, dtype=torch.long)
    target_mask = torch.zeros(shape, dtype=torch.bool)
    for row, groups in enumerate(rows):
        start = 0
        for number, index in ((number, index) for group in groups for number, index in enumerate(group)):
            item = documents[index]
            first = item.prompt_length if number else 0
            end = start + len(item.tokens) - first
            tokens[row, start:end] = torch.tensor(item.tokens[first:])
            positions[row, start:end] = torch.arange(first, len(item.tokens))
            document[row, start:end] = index
            target_mask[row, start + item.prompt_length - first : end] = True
            start = end
    return Batch(tokens, positions, document, target_mask)


def batch_of_rows(rows: Rows) -> Batch:
    """The batch [rows, row_length]: positions count from 0 in each document, and all but its first token are targets.

    The first token of a row is never a target, for nothing before it is in the row.
    """
    tokens, document = torch.from_numpy(rows.tokens), torch.from_numpy(rows.document)
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    index = torch.arange(tokens.shape[1]).expand_as(tokens)
    positions = index - torch.where(begins, index, 0).cummax(dim=1).values
    return Batch(tokens, positions, document, ~begins)
