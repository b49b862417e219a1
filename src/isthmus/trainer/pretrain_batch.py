"""Rows of a corpus as a batch of the trainer."""

from __future__ import annotations

import torch

from isthmus.data.pretrain import Rows
from isthmus.trainer.batch import Batch


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
