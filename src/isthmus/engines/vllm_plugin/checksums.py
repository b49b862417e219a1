"""Checksums of tensors that do not depend on where an engine keeps their elements.

The checksum of a tensor is the sum, modulo 2^64, of a hash of (row-major position in the checkpoint's tensor, bit
pattern) over its elements. A sum can be taken in any order and in pieces: fused projections, shards of ranks and
padding leave it as it is, and a transposed or stale element does not. It is no signature: who wants to can forge it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 1 << 20
"""Elements that are hashed at a time: the hash of each takes eight bytes."""
_A, _B, _C = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""Odd constants of splitmix64 (Vigna 2015) as signed numbers: 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9,
0x94D049BB133111EB."""
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Place:
    """Elements of a flat storage: those of `torch.as_strided(flat, size, stride, offset)`."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, view: Tensor) -> Place:
        """Where a view lies in its storage, without dimensions of one element."""
        kept = [(size, step) for size, step in zip(view.size(), view.stride(), strict=True) if size != 1]
        return cls(int(view.storage_offset()), tuple(size for size, _ in kept), tuple(step for _, step in kept))

    @property
    def count(self) -> int:
        """How many elements these are, each counted once."""
        count = 1
        for size, step in zip(self.size, self.stride, strict=True):
            count *= size if step else 1
        return count

    @property
    def last(self) -> int:
        """The largest place; -1 of none."""
        if 0 in self.size:
            return -1
        return self.offset + sum((size - 1) * step for size, step in zip(self.size, self.stride, strict=True))

    def of_flat(self, flat: Tensor) -> Tensor:
        """These elements of a flat tensor."""
        return torch.as_strided(flat, self.size, self.stride, self.offset)


@dataclass(frozen=True)
class Piece:
    """What an engine holds of a checkpoint's tensor: the elements at `place`, in `dtype`, and their checksum."""

    place: Place
    dtype: str
    checksum: int

    def shown(self) -> dict[str, Any]:
        """As JSON; the checksum is text, for it has more bits than other readers of JSON keep."""
        return asdict(self) | {"checksum": str(self.checksum)}

    @classmethod
    def read(cls, content: dict[str, Any]) -> Piece:
        """What `shown` made. Raises KeyError, TypeError or ValueError for anything else."""
        place = content["place"]
        size, stride = (tuple(int(one) for one in place[key]) for key in ("size", "stride"))
        return cls(Place(int(place["offset"]), size, stride), str(content["dtype"]), int(content["checksum"]))


def element_sum(values: Tensor, positions: Tensor) -> int:
    """The checksum of elements at these row-major positions of their tensor; both of any, and of the same, shape."""
    bits, where = _bits(values).reshape(-1), positions.reshape(-1)
    total = 0
    for start in range(0, bits.numel(), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        total += int(_mixed(where[part].to(torch.int64) * _A + bits[part].to(torch.int64) * _B).sum())
    return total % (1 << 64)


def tensor_sum(tensor: Tensor) -> int:
    """The checksum of a whole tensor as a checkpoint holds it."""
    return element_sum(tensor, torch.arange(tensor.numel(), device=tensor.device))


def piece_of(values: Tensor, place: Place) -> Piece:
    """The piece that a view holds of elements at `place` of a contiguous tensor of the checkpoint."""
    positions = torch.full((), place.offset, dtype=torch.int64, device=values.device)
    for size, step in zip(place.size, place.stride, strict=True):
        positions = positions[..., None] + step * torch.arange(size, device=values.device)
    return Piece(place, str(values.dtype).removeprefix("torch."), element_sum(values, positions))


def whole_piece(tensor: Tensor) -> Piece:
    """The piece of whoever holds all of a tensor as the checkpoint does."""
    flat = tensor.detach().contiguous().reshape(-1)
    return piece_of(flat, Place(0, (flat.numel(),), (1,)))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bit patterns."""
    return one.dtype == other.dtype and torch.equal(_bits(one), _bits(other))


def combined(pieces: Iterable[Piece], count: int) -> tuple[str, int] | None:
    """(dtype, checksum) of a tensor of `count` elements from the pieces that all ranks hold.

    None if they do not cover it, are in several dtypes, or if ranks that hold the same elements have other values.
    """
    found: dict[Place, Piece] = {}
    for piece in pieces:
        if found.setdefault(piece.place, piece) != piece:
            return None
    if sum(place.count for place in found) != count or len({piece.dtype for piece in found.values()}) != 1:
        return None
    return next(iter(found.values())).dtype, sum(piece.checksum for piece in found.values()) % (1 << 64)


def _bits(values: Tensor) -> Tensor:
    return values.detach().contiguous().view(_WHOLE[values.element_size()])


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _B
    x = (x ^ _shifted(x, 27)) * _C
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
