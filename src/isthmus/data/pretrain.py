"""Pretraining data: a folder of text or of token shards as rows of fixed length, in an order that needs no state.

Row k depends on the content of the folder, the seed, the row length and k alone. The shards are read in an order drawn
from (seed, epoch), the rows of a shard in one drawn from (seed, epoch, shard), and after the last row comes the next
epoch; so the number of rows read is all that has to be kept to go on, in a world of any size.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.data.shards import SHARD_BYTES, TOKENIZER_FILES, ShardReader, Shards, data_files, open_shards, shard_size
from isthmus.data.text_files import TextPiece, cut_text, text_pieces, texts_of
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import IsthmusError

FEISTEL_ROUNDS = 8
SAMPLE_PIECE_BYTES = 256 * 2**10
WAIT_S = 0.2
_WORD = 2**64 - 1


@dataclass(frozen=True)
class Rows:
    """Rows of a corpus, int64 [rows, row_length] both.

    `document` numbers the documents of the batch from 0, row after row. A document that goes on in another row has
    another number there.
    """

    tokens: np.ndarray
    document: np.ndarray


def wait_a_moment() -> None:
    """Sleep until it is worth looking again."""
    time.sleep(WAIT_S)


class TokenStream:
    """The rows of a folder.

    Text is tokenised shard by shard, when a row of the shard is first asked for, into `cache`. Only a process with
    `first_of_node` tokenises; the others call `wait` again and again until the shard is there. Where several processes
    read, each calls `prepare` with all rows of the step before it calls `rows` with its own: the process that tokenises
    must know what the others wait for.

    Every document of text begins with the tokenizer's BOS, if it has one that is not its EOS, and ends with its EOS; a
    document without text is left out, and special tokens written out in a text become their ids. The EOS belongs to
    the document that it ends. Tokens at the end of a shard that do not fill a row are in no row: `left_out`.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        row_length: int,
        seed: int,
        cache: Path,
        first_of_node: bool = True,
        wait: Callable[[], None] = wait_a_moment,
        *,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.row_length, self.epoch = row_length, 0
        self._folder, self._seed = folder, seed
        size = shard_size(row_length, shard_bytes)
        self._shards = open_shards(folder, tokenizer, cache, first_of_node, wait, size)
        self._reader = ShardReader(self._shards)
        self._first = self._later = _Epoch(0, self._shards, seed, row_length)

    def prepare(self, first: int, count: int) -> None:
        """Make ready all shards that hold the rows [first, first + count), and those before them in the order."""
        self._locate(first + count - 1)

    def rows(self, first: int, count: int, stride: int = 1) -> Rows:
        """The rows first, first + stride, ... (`count` of them). `epoch` is then that of the last, from 0.

        Raises IsthmusError if the folder has no whole row, a file cannot be read, or a token is outside the vocabulary.
        """
        tokens = np.stack([self._row(first + stride * index) for index in range(count)])
        return Rows(tokens, _documents(tokens, self._shards.eos_id, self._shards.bos_id))

    @property
    def left_out(self) -> int:
        """Tokens of an epoch that no row holds, in the shards that are ready."""
        return sum(self._shards.tokens(shard) % self.row_length for shard in self._first.known)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what row numbers depend on: names and sizes of the files, tokenizer, seed and row length.

        Keep it beside a position: rows of another fingerprint are other rows. A file that is edited without a change
        of its size is tokenised anew, but does not show here.
        """
        parts = hashlib.sha256(repr((self._seed, self.row_length)).encode())
        for part in self._shards.identity():
            parts.update(repr(part).encode())
        return parts.hexdigest()

    def _row(self, number: int) -> np.ndarray:
        epoch, shard, row = self._locate(number)
        self.epoch = epoch
        return self._reader.read(shard, row * self.row_length, self.row_length)

    def _locate(self, number: int) -> tuple[int, int, int]:
        """(epoch, shard, row of the shard) of a row."""
        if (place := self._first.find(number)) is not None:
            return 0, *place
        total = self._first.rows
        if not total:
            raise IsthmusError(
                f"{self._folder} has {self.left_out} tokens and no shard of it a whole row of {self.row_length}: add "
                "data, or make pretrain.row_length smaller"
            )
        epoch, rest = divmod(number, total)
        if self._later.number != epoch:
            self._later = _Epoch(epoch, self._shards, self._seed, self.row_length)
        place = self._later.find(rest)
        assert place is not None
        return epoch, *place


class _Epoch:
    """The order of the shards in one epoch, and where each begins, as far as anyone has asked."""

    def __init__(self, number: int, shards: Shards, seed: int, row_length: int):
        self.number = number
        self._shards, self._seed, self._row_length = shards, seed, row_length
        keys = round_keys("shards", seed, number)
        self._order = [permuted(place, len(shards), keys) for place in range(len(shards))]
        self._ends: list[int] = []

    @property
    def rows(self) -> int:
        """Rows of the shards that are known; of the whole epoch once `find` has returned None."""
        return self._ends[-1] if self._ends else 0

    @property
    def known(self) -> list[int]:
        """The shards whose rows are counted."""
        return self._order[: len(self._ends)]

    def find(self, number: int) -> tuple[int, int] | None:
        """(shard, row of the shard) of a row of the epoch, or None after its last."""
        while number >= self.rows:
            if len(self._ends) == len(self._order):
                return None
            shard = self._order[len(self._ends)]
            self._ends.append(self.rows + self._shards.tokens(shard) // self._row_length)
        index = bisect.bisect_right(self._ends, number)
        begin = self._ends[index - 1] if index else 0
        keys = round_keys("rows", self._seed, self.number, self._order[index])
        return self._order[index], permuted(number - begin, self._ends[index] - begin, keys)


def permuted(place: int, size: int, keys: tuple[int, ...]) -> int:
    """What stands at a place of a pseudo-random permutation of range(size), in constant memory.

    A Feistel network on the next power of four, walked until it falls below `size` (format-preserving encryption by
    cycle walking, Black and Rogaway 2002).
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        place = left << half | right
        if place < size:
            return place


@functools.lru_cache(maxsize=64)
def round_keys(*parts: object) -> tuple[int, ...]:
    """Keys of a permutation; they depend on the parts alone."""
    digest = hashlib.sha512(repr(parts).encode()).digest()
    return tuple(int.from_bytes(digest[8 * index : 8 * index + 8], "big") for index in range(FEISTEL_ROUNDS))


def _mixed(value: int) -> int:
    """The finaliser of splitmix64: every input bit moves every output bit."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31


def _documents(tokens: np.ndarray, eos_id: int | None, bos_id: int | None) -> np.ndarray:
    begins = np.zeros(tokens.shape, dtype=bool)
    begins[:, 0] = True
    if eos_id is not None:
        begins[:, 1:] |= tokens[:, :-1] == eos_id
    if bos_id is not None:
        begins |= tokens == bos_id
    return np.cumsum(begins.reshape(-1), dtype=np.int64).reshape(tokens.shape) - 1


def corpus_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer that lies in a training folder, or None. Raises IsthmusError for token shards that have none."""
    if (folder / TOKENIZER_FILES[0]).is_file():
        return Tokenizer.load(folder)
    _refuse_tokens(folder, data_files(folder)[1])
    return None


def sample_texts(folder: Path, limit_bytes: int) -> Iterator[str]:
    """Texts from all over a folder, at most `limit_bytes` of UTF-8, to train a tokenizer on; always the same ones.

    A folder that is larger gives the beginnings of pieces drawn from all of its files. Raises IsthmusError for a folder
    of token shards.
    """
    files, tokens = data_files(folder)
    _refuse_tokens(folder, tokens)
    pieces = [piece for file in files for piece in text_pieces(file, folder, SHARD_BYTES)]
    keys = round_keys("sample", len(pieces))
    share, left = max(SAMPLE_PIECE_BYTES, limit_bytes // max(1, len(pieces))), limit_bytes
    for place in range(len(pieces)):
        if left <= 0:
            return
        for text in _beginning(pieces[permuted(place, len(pieces), keys)], min(share, left)):
            left -= len(text.encode("utf-8"))
            yield text


def _beginning(piece: TextPiece, limit_bytes: int) -> Iterator[str]:
    """The first texts of a piece, the last of them cut."""
    for text in texts_of(piece):
        for part in cut_text(text.blocks):
            encoded = part.encode("utf-8")
            if kept := encoded[:limit_bytes].decode("utf-8", errors="ignore"):
                yield kept
            limit_bytes -= len(encoded)
            if limit_bytes <= 0:
                return


def _refuse_tokens(folder: Path, tokens: list[Path]) -> None:
    if tokens:
        raise IsthmusError(
            f"{folder} holds token shards, which say nothing about their text: put the tokenizer.json and "
            "tokenizer_config.json that they were written with into that folder, or start from a checkpoint with "
            "[model] from"
        )
