"""A folder of text or of tokens as token shards, the units in which pretraining data is tokenised and shuffled.

A text folder holds *.txt (one document a file) and *.jsonl (one document a line, under the key "text"), in UTF-8.
A token folder holds flat arrays of token ids, *.bin or one-dimensional *.npy, and JSON that describes them
(`TokenLayout`): NAME.json beside NAME.bin, or index.json in the folder for all of them. That covers what nanoGPT and
llm.c (`header_bytes` 1024) write, and Megatron's .bin (dtype int32) if its documents end in an end-of-document token.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isthmus.data.text_files import TextPiece, cut_text, text_pieces, texts_of
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import IsthmusError
from isthmus.lines import read_json
from isthmus.run import replaced, sha256_file

SHARD_BYTES = 16 * 2**20
"""Text in a shard, about: small files are joined and large ones cut, so that a shard has half to one and a half."""
ROWS_PER_SHARD = 256
"""A shard of text is made larger than SHARD_BYTES where rows are so long that it would hold fewer of them, about."""
BYTES_PER_TOKEN = 4
OPEN_FILES = 16
HEADER_MAGICS = (20240520, 20240801)
"""First int32 of the 1024-byte header of llm.c's token files (uint16 and uint32 tokens)."""
TEXT_SUFFIXES, TOKEN_SUFFIXES = (".txt", ".jsonl"), (".bin", ".npy")
IGNORED_SUFFIXES = ("", ".md", ".py", ".pkl")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "vocab.json",
)
"""What may lie beside a tokenizer.json and is not data."""
LAYOUT_EXAMPLE = '{"dtype": "uint16", "eos_id": 0}'
T = TypeVar("T")


class TokenLayout(BaseModel):
    """What the JSON beside token files says. `dtype` is needed for .bin; integers are little-endian.

    Documents end with `eos_id`, or begin with `bos_id`, or both; at least one is needed. `vocab_size`, the number of
    `tokens` and `tokenizer_sha256` (of the tokenizer.json that Isthmus saves) are checked if they are there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None
    eos_id: int | None = None
    bos_id: int | None = None
    vocab_size: int | None = None
    tokenizer_sha256: str | None = None
    tokens: int | None = None
    header_bytes: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class TokenFile:
    """A flat array of `tokens` token ids."""

    path: Path
    tokens: int
    dtype: str
    header_bytes: int = 0

    def open(self) -> np.ndarray:
        """The ids, mapped from the disk."""
        if self.path.suffix == ".npy":
            return np.load(self.path, mmap_mode="r", allow_pickle=False)
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.header_bytes, shape=(self.tokens,))


class Shards(Protocol):
    """Numbered token shards, with what ends and begins a document in them."""

    @property
    def eos_id(self) -> int | None: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def vocab_size(self) -> int: ...

    def __len__(self) -> int: ...

    def tokens(self, shard: int) -> int:
        """Number of tokens of a shard, which is made ready if it is not."""
        ...

    def files(self, shard: int) -> list[TokenFile]:
        """The arrays that a shard is made of, in order; the shard must be ready."""
        ...

    def identity(self) -> Iterator[object]:
        """What the content of the shards is known by: names, sizes, layout, tokenizer."""
        ...


def open_shards(
    folder: Path, tokenizer: Tokenizer, cache: Path, first_of_node: bool, wait: Callable[[], None], shard_bytes: int
) -> Shards:
    """The shards of a folder. Raises IsthmusError for a folder that is missing, empty, mixed or not understood."""
    text, tokens = data_files(folder)
    if tokens:
        return TokenShards(folder, tokens, tokenizer, shard_bytes // BYTES_PER_TOKEN)
    return TextShards(text_shards(folder, text, shard_bytes), tokenizer, cache, first_of_node, wait)


def data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(text files, token files) of a folder and its sub-folders, sorted by name; one of the two lists is empty."""
    text: list[Path] = []
    tokens: list[Path] = []
    others: list[Path] = []
    for path in _files_below(folder):
        if path.name in TOKENIZER_FILES and (path.parent / TOKENIZER_FILES[0]).is_file():
            continue
        kind = text if path.suffix in TEXT_SUFFIXES else tokens if path.suffix in TOKEN_SUFFIXES else others
        kind.append(path)
    if text and tokens:
        raise IsthmusError(
            f"{folder} mixes text ({text[0].name}) and token shards ({tokens[0].name}); keep each kind in a folder of "
            "its own and name one of them"
        )
    if not text and not tokens:
        raise IsthmusError(
            f"{folder} holds nothing to train on: put *.txt or *.jsonl files in it, or token shards (*.bin, *.npy)"
        )
    for path in others:
        _refuse_unless_known(path, tokens)
    return text, tokens


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer.json that `Tokenizer.save` writes: equal vocabularies and rules, equal hash."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return sha256_file(Path(folder) / "tokenizer.json")


class TokenShards:
    """Shards of files that hold tokens already: small files are joined, a large one is a shard of its own."""

    def __init__(self, folder: Path, paths: list[Path], tokenizer: Tokenizer, shard_tokens: int):
        self.vocab_size = tokenizer.vocab_size
        self._folder, self._paths = folder, paths
        layouts = [_layout_of(path, folder) for path in paths]
        self.eos_id, self.bos_id = _common_borders(folder, paths, layouts)
        if expected := {layout.tokenizer_sha256 for layout in layouts if layout.tokenizer_sha256}:
            _check_tokenizer(folder, expected, tokenizer_sha256(tokenizer))
        _check_vocabulary(folder, layouts, self)
        found = [_token_file(path, layout) for path, layout in zip(paths, layouts, strict=True)]
        self._shards = grouped([file for file in found if file.tokens], lambda file: file.tokens, shard_tokens)

    def __len__(self) -> int:
        return len(self._shards)

    def tokens(self, shard: int) -> int:
        return sum(file.tokens for file in self._shards[shard])

    def files(self, shard: int) -> list[TokenFile]:
        return self._shards[shard]

    def identity(self) -> Iterator[object]:
        yield from (self.eos_id, self.bos_id)
        for file in (file for shard in self._shards for file in shard):
            yield file.path.relative_to(self._folder).as_posix(), file.tokens, file.dtype, file.header_bytes


class TextShards:
    """Shards of text, tokenised into `cache` when they are first needed, by the first process of each node.

    The name of a cached shard is a hash of the names, sizes and modification times of its files and of the tokenizer,
    so that a changed file is tokenised anew. Its JSON is written last: a shard without it is not finished.
    """

    def __init__(
        self,
        plan: list[list[TextPiece]],
        tokenizer: Tokenizer,
        cache: Path,
        first_of_node: bool,
        wait: Callable[[], None],
    ):
        self.vocab_size = tokenizer.vocab_size
        self.eos_id = tokenizer.eos_id
        self.bos_id = tokenizer.bos_id if tokenizer.bos_id != tokenizer.eos_id else None
        self.dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        self._plan, self._tokenizer, self._cache = plan, tokenizer, cache
        self._first_of_node, self._wait = first_of_node, wait
        self._tokenizer_sha256 = tokenizer_sha256(tokenizer)
        self._counts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._plan)

    def tokens(self, shard: int) -> int:
        while shard not in self._counts:
            path = self._path(shard)
            count = _finished_tokens(path, self.dtype)
            if count is not None:
                self._counts[shard] = count
            elif self._first_of_node:
                self._tokenise(shard, path)
            else:
                self._wait()
        return self._counts[shard]

    def files(self, shard: int) -> list[TokenFile]:
        return [TokenFile(self._path(shard), self._counts[shard], _little_endian(self.dtype))]

    def identity(self) -> Iterator[object]:
        yield from (self._tokenizer_sha256, self.eos_id, self.bos_id)
        yield from ((piece.name, piece.start, piece.end) for shard in self._plan for piece in shard)

    def _path(self, shard: int) -> Path:
        parts = [(piece.name, piece.size, piece.mtime_ns, piece.start, piece.end) for piece in self._plan[shard]]
        key = (parts, self._tokenizer_sha256, self.eos_id, self.bos_id)
        return self._cache / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.bin"

    def _tokenise(self, shard: int, path: Path) -> None:
        count = 0
        with replaced(path, socket.gethostname()) as file:
            for ids in self._ids(self._plan[shard]):
                np.asarray(ids, dtype=_little_endian(self.dtype)).tofile(file)
                count += len(ids)
        layout = TokenLayout(
            dtype=self.dtype,
            eos_id=self.eos_id,
            bos_id=self.bos_id,
            vocab_size=self.vocab_size,
            tokenizer_sha256=self._tokenizer_sha256,
            tokens=count,
        )
        with replaced(path.with_suffix(".json"), socket.gethostname()) as file:
            file.write(layout.model_dump_json(exclude_none=True).encode())

    def _ids(self, pieces: Iterable[TextPiece]) -> Iterator[list[int]]:
        for piece in pieces:
            for text in texts_of(piece):
                if text.begins and self.bos_id is not None:
                    yield [self.bos_id]
                for part in cut_text(text.blocks):
                    yield self._tokenizer.encode(part)
                if text.ends:
                    yield [self.eos_id]


def text_shards(folder: Path, files: list[Path], shard_bytes: int) -> list[list[TextPiece]]:
    """The pieces of text of each shard: bytes of files, in the order of the files' names."""
    pieces = [piece for file in files for piece in text_pieces(file, folder, shard_bytes)]
    if not pieces:
        raise IsthmusError(f"every text file in {folder} is empty; put text into them, or name another folder")
    return grouped(pieces, lambda piece: piece.end - piece.start, shard_bytes)


def grouped(items: Iterable[T], size: Callable[[T], int], target: int) -> list[list[T]]:
    """Neighbours joined until a group has half of `target`; a smaller rest joins the last group."""
    groups: list[list[T]] = []
    open_group: list[T] = []
    filled = 0
    for item in items:
        open_group.append(item)
        filled += size(item)
        if filled >= target / 2:
            groups.append(open_group)
            open_group, filled = [], 0
    if open_group:
        groups = [*groups[:-1], groups[-1] + open_group] if groups else [open_group]
    return groups


class ShardReader:
    """Reads tokens from anywhere in the shards, through at most OPEN_FILES mapped files."""

    def __init__(self, shards: Shards):
        self._shards = shards
        self._open = functools.lru_cache(maxsize=OPEN_FILES)(TokenFile.open)

    def read(self, shard: int, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of a shard as int64. Raises IsthmusError for one outside the vocabulary."""
        parts = []
        for file in self._shards.files(shard):
            if start < file.tokens and count > 0:
                part = np.asarray(self._open(file)[start : start + count], dtype=np.int64)
                self._check(part, file)
                parts.append(part)
                count -= len(part)
            start = max(0, start - file.tokens)
        return np.concatenate(parts)

    def _check(self, part: np.ndarray, file: TokenFile) -> None:
        if part.min() < 0 or part.max() >= self._shards.vocab_size:
            wrong = part[(part < 0) | (part >= self._shards.vocab_size)][0]
            raise IsthmusError(
                f"{file.path} holds the token {wrong}, but the tokenizer has {self._shards.vocab_size} tokens. Give "
                "the tokenizer that wrote these shards; if it is the right one, check dtype and header_bytes in the "
                "JSON beside them."
            )


def _files_below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise IsthmusError(f"there is no folder {folder}; name one that holds text (*.txt, *.jsonl) or token shards")
    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent) / name for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _refuse_unless_known(path: Path, tokens: list[Path]) -> None:
    if path.suffix in IGNORED_SUFFIXES:
        return
    if tokens and path.suffix == ".json" and path.stem in {"index", *(one.stem for one in tokens)}:
        return
    if path.suffix == ".idx" and path.with_suffix(".bin") in tokens:
        raise IsthmusError(
            f"{path} is a Megatron index, which is not read. Its .bin is a flat array: if its documents end in an "
            "end-of-document token (--append-eod), move the .idx away and write an index.json such as "
            '{"dtype": "int32", "eos_id": 0}.'
        )
    raise IsthmusError(
        f"{path} is neither text (*.txt, *.jsonl) nor a token shard (*.bin, *.npy with JSON beside them). Convert it, "
        "or move it out of the folder."
    )


def _layout_of(path: Path, root: Path) -> TokenLayout:
    candidates = (path.with_suffix(".json"), path.parent / "index.json", root / "index.json")
    source = next((candidate for candidate in candidates if candidate.is_file()), None)
    if source is None:
        raise IsthmusError(
            f"nothing says what {path} holds. Write {candidates[1]} with the dtype and the id of the token that ends a "
            f"document, such as {LAYOUT_EXAMPLE}."
        )
    try:
        layout = TokenLayout.model_validate(read_json(source))
    except ValueError as error:
        raise IsthmusError(f"{source} does not describe token shards: {_first_fault(error)}") from None
    _check_layout(layout, source, path)
    return layout


def _first_fault(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    fault = error.errors()[0]
    where = ".".join(map(str, fault["loc"])) or "the whole"
    return f"{where}: {fault['msg']}. Known keys: {', '.join(TokenLayout.model_fields)}. Example: {LAYOUT_EXAMPLE}"


def _check_layout(layout: TokenLayout, source: Path, path: Path) -> None:
    if layout.dtype is None and path.suffix == ".bin":
        raise IsthmusError(f"{source} does not say the dtype of {path.name}; write e.g. {LAYOUT_EXAMPLE}")
    if layout.eos_id is None and layout.bos_id is None:
        raise IsthmusError(
            f"{source} does not say where documents end: write eos_id, the token at the end of each, or bos_id, the "
            "token at its beginning"
        )
    if layout.eos_id == layout.bos_id:
        raise IsthmusError(
            f"{source} has the same eos_id and bos_id: keep eos_id if the token ends documents, else bos_id"
        )


def _token_file(path: Path, layout: TokenLayout) -> TokenFile:
    try:
        file = _npy_file(path) if path.suffix == ".npy" else _bin_file(path, layout)
    except OSError as error:
        raise IsthmusError(f"{path} cannot be read: {error.strerror or error}") from None
    if layout.tokens is not None and layout.tokens != file.tokens:
        raise IsthmusError(
            f"{path} has {file.tokens} tokens, its description says {layout.tokens}: it is cut off or was replaced. "
            "Copy or write it again."
        )
    return file


def _npy_file(path: Path) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise IsthmusError(f"{path} is not a .npy array that can be read: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise IsthmusError(
            f"{path} is an array of {array.dtype} with {array.ndim} dimensions; a token shard is a one-dimensional "
            "array of integers"
        )
    return TokenFile(path, len(array), str(array.dtype))


def _bin_file(path: Path, layout: TokenLayout) -> TokenFile:
    assert layout.dtype is not None
    size, width = path.stat().st_size - layout.header_bytes, np.dtype(layout.dtype).itemsize
    with path.open("rb") as file:
        begin = int.from_bytes(file.read(4), "little")
    if begin in HEADER_MAGICS and not layout.header_bytes:
        raise IsthmusError(f'{path} begins with a header of 1024 bytes; write "header_bytes": 1024 into its JSON')
    if size < 0 or size % width:
        raise IsthmusError(
            f"{path} has {max(size, 0)} bytes of tokens, which is not a multiple of the {width} bytes of "
            f"{layout.dtype}: the dtype is another one, or the file is cut off"
        )
    return TokenFile(path, size // width, _little_endian(layout.dtype), layout.header_bytes)


def _little_endian(dtype: str) -> str:
    return np.dtype(dtype).newbyteorder("<").str


def _common_borders(folder: Path, paths: list[Path], layouts: list[TokenLayout]) -> tuple[int | None, int | None]:
    borders = [(layout.eos_id, layout.bos_id) for layout in layouts]
    for path, border in zip(paths, borders, strict=True):
        if border != borders[0]:
            raise IsthmusError(
                f"{path} has eos_id {border[0]} and bos_id {border[1]}, {paths[0].name} has {borders[0][0]} and "
                f"{borders[0][1]}: shards of different tokenizers. Keep those of one tokenizer in {folder}."
            )
    return borders[0]


def _check_tokenizer(folder: Path, expected: set[str], actual: str) -> None:
    if expected != {actual}:
        raise IsthmusError(
            f"the shards in {folder} were written with another tokenizer (tokenizer_sha256 {min(expected)[:16]}..., "
            f"this one has {actual[:16]}...). Give the tokenizer that wrote them, or write them again."
        )


def _check_vocabulary(folder: Path, layouts: list[TokenLayout], shards: Shards) -> None:
    largest = max((layout.vocab_size for layout in layouts if layout.vocab_size), default=0)
    border = max(one for one in (shards.eos_id, shards.bos_id) if one is not None)
    if max(largest, border + 1) > shards.vocab_size:
        raise IsthmusError(
            f"the shards in {folder} use {max(largest, border + 1)} tokens, the tokenizer has {shards.vocab_size}. "
            "Give the tokenizer that wrote them."
        )


def _finished_tokens(path: Path, dtype: str) -> int | None:
    """Tokens of a cached shard, or None if it is not there or not whole."""
    try:
        layout = TokenLayout.model_validate_json(path.with_suffix(".json").read_bytes())
        whole = layout.tokens is not None and path.stat().st_size == layout.tokens * np.dtype(dtype).itemsize
    except (FileNotFoundError, ValidationError):
        return None
    return layout.tokens if whole else None


def shard_size(row_length: int, shard_bytes: int = SHARD_BYTES) -> int:
    """Bytes of text in a shard, about, for rows of so many tokens."""
    return max(shard_bytes, math.ceil(ROWS_PER_SHARD * BYTES_PER_TOKEN * row_length))
