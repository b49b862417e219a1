"""The tokens that draws were made among, where top_p, top_k or min_p left others out: what vLLM calls sampling masks.

A nucleus has few tokens, and a flat distribution leaves few out: for each draw the shorter list is written down.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

_WORD = np.dtype("<i4")


class KeptSet(NamedTuple):
    """Token ids of one draw in rising order: of those that were kept, or of those that were left out."""

    ids: NDArray[np.int32]
    left_out: bool

    @classmethod
    def of(cls, kept: NDArray[np.bool_]) -> KeptSet:
        """The shorter list of a mask [V], true for what was kept."""
        left_out = 2 * int(kept.sum()) > len(kept)
        return cls(np.flatnonzero(~kept if left_out else kept).astype(np.int32), left_out)


@dataclass(frozen=True)
class Kept:
    """The sets of `draws` draws, of a model with `vocabulary` tokens: base64 of zstd of 32-bit words, little-endian.

    First a word for each draw: the length of its list, or, where the list is of what was left out, -1 less that length.
    Then the lists.
    """

    draws: int
    vocabulary: int
    data: str

    @classmethod
    def of(cls, sets: Sequence[KeptSet], vocabulary: int) -> Kept:
        heads = np.array([-1 - len(one.ids) if one.left_out else len(one.ids) for one in sets], dtype=np.int32)
        words = np.concatenate([heads, *(one.ids for one in sets)]).astype(_WORD)
        packed = zstandard.ZstdCompressor().compress(words.tobytes())
        return cls(len(sets), vocabulary, base64.b64encode(packed).decode())

    def sets(self) -> list[KeptSet]:
        """One for each draw. Raises ValueError if that is not what is written here."""
        words = np.frombuffer(self._unpacked(), dtype=_WORD).astype(np.int32)
        heads, ids = words[: self.draws], words[self.draws :]
        lengths = np.where(heads < 0, -1 - heads, heads)
        fits = len(heads) == self.draws and lengths.sum() == len(ids)
        if not fits or (len(ids) and not 0 <= ids.min() <= ids.max() < self.vocabulary):
            raise ValueError(f"what {self.draws} draws from {self.vocabulary} tokens kept is not what is written down")
        parts = np.split(ids, np.cumsum(lengths)[:-1]) if self.draws else []
        return [KeptSet(part, bool(head < 0)) for part, head in zip(parts, heads, strict=True)]

    def _unpacked(self) -> bytes:
        packed, longest = base64.b64decode(self.data, validate=True), self.draws * (1 + self.vocabulary // 2)
        try:
            announced = zstandard.get_frame_parameters(packed).content_size
            if announced > _WORD.itemsize * longest:
                raise ValueError(f"the lists of {self.draws} draws announce {announced:,} bytes, which is too much")
            return zstandard.ZstdDecompressor().decompress(packed, max_output_size=announced)
        except zstandard.ZstdError as error:
            raise ValueError(f"the tokens that draws kept cannot be unpacked: {error}") from None

    def check(self, tokens: Sequence[int]) -> None:
        """Raise ValueError unless there is one set for each of these tokens, and it is in it."""
        sets = self.sets()
        if len(sets) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens come with what {len(sets)} draws kept")
        for token, one in zip(tokens, sets, strict=True):
            place = int(np.searchsorted(one.ids, token))
            if (place < len(one.ids) and one.ids[place] == token) == one.left_out or not 0 <= token < self.vocabulary:
                raise ValueError(f"token {token} is not among those that its draw kept")
