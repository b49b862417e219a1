"""The paged cache: entries of all layers in blocks of tokens, shared between sequences that begin alike.

An entry is a latent and a rotated key, or the keys and values of all heads (`cache_width` numbers per token and layer).
A full block is known by a digest of all tokens up to its end, so a later prompt with the same beginning finds it.
Blocks that nobody uses keep their content until their place is needed, the longest unused first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NULL_BLOCK = 0
"""Never given away and always zero: what fills up the tables of shorter sequences."""


class PagedStore:
    """Per layer one tensor [blocks * block_size, W]; unwritten places are zero, so that masked places are finite.

    `routes` [blocks * block_size, R] has the experts of all layers for the token at each place, if R, `route_width`, is
    not 0.
    """

    def __init__(
        self,
        layers: int,
        blocks: int,
        block_size: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        route_width: int = 0,
    ):
        self.block_size, self.blocks = block_size, blocks
        self.routes = np.zeros((blocks * block_size, route_width), dtype=np.int16) if route_width else None
        self.layers = [torch.zeros(blocks * block_size, width, dtype=dtype, device=device) for _ in range(layers)]

    def copy_block(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of a block."""
        a, b = source * self.block_size, target * self.block_size
        for store in self.layers:
            store[b : b + length] = store[a : a + length]
        if self.routes is not None:
            self.routes[b : b + length] = self.routes[a : a + length]

    def holds_numbers(self, blocks: list[int]) -> bool:
        """Whether all entries of these blocks are finite."""
        paged = (store.view(self.blocks, -1)[blocks] for store in self.layers)
        return all(bool(torch.isfinite(entries).all()) for entries in paged)

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks, after a sequence that left entries in them that are no numbers."""
        for block in blocks:
            for store in self.layers:
                store[block * self.block_size : (block + 1) * self.block_size].zero_()


class BlockPool:
    """Which blocks are free, how often the others are used, and what the full ones hold."""

    def __init__(self, blocks: int):
        self.total = blocks - 1
        self._free = list(range(blocks - 1, NULL_BLOCK, -1))
        self._uses = [0] * blocks
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that can be given away."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.total - self.available

    def allocate(self) -> int | None:
        """A block for one user, or None if all are in use."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._uses[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more user of a block that is used or idle."""
        if self._uses[block] == 0:
            del self._idle[block]
        self._uses[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One user less for each block of a sequence; its last block is the first to be given away again."""
        for block in reversed(blocks):
            assert self._uses[block] > 0, f"block {block} is released twice"
            self._uses[block] -= 1
            if self._uses[block] == 0:
                if block in self._digest_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def find(self, digest: bytes) -> int | None:
        """The block whose content has this digest."""
        return self._block_of.get(digest)

    def register(self, block: int, digest: bytes) -> None:
        """Note what a full block holds. If another block holds the same, that one stays the known one."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self, blocks: list[int]) -> None:
        """The content of these blocks, which are in use, must not be found any more."""
        for block in blocks:
            self._forget(block)

    def forget_all(self) -> None:
        """Nothing that was stored may be found any more: the weights have changed."""
        self._block_of.clear()
        self._digest_of.clear()
        self._free.extend(self._idle)
        self._idle.clear()

    def users(self) -> dict[int, int]:
        """How often each used block is used."""
        return {block: uses for block, uses in enumerate(self._uses) if uses}

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]


def chained_digest(before: bytes, tokens: NDArray[np.int32]) -> bytes:
    """128 bits for a full block: its tokens, and through `before`, the digest of the block before, all earlier ones."""
    return hashlib.blake2b(tokens.tobytes(), digest_size=16, key=before).digest()


def places_of(table: NDArray[np.int32], positions: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
    """Where `positions` of a sequence lie in a store, by the sequence's table of blocks."""
    return table[positions // block_size].astype(np.int64) * block_size + positions % block_size


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_size)


def to_tensor(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """An array on the device of the model."""
    return torch.from_numpy(array).to(device)
