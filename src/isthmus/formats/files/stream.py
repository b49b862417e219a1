"""Writing weights as safetensors files tensor by tensor, in any order and from any thread.

Types and shapes are known beforehand, so each file's header is written first and each tensor goes to its place. The
bytes are those that the safetensors library writes: names sorted within each type, wide types first, so that every
tensor is aligned.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from isthmus.errors import DamagedFile
from isthmus.formats import Layout
from isthmus.run import explain_io_errors, sha256_file, write_atomic

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLUSH_BYTES = 128 * 2**20
_ALIGNMENT = 8
# The names in a header, in the order in which the library sorts types (its enum `Dtype`), last first.
_KINDS: dict[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
KINDS = {kind: dtype for dtype, kind in _KINDS.items()}
"""torch's type for each name of a type in a safetensors header."""
_RANK = {dtype: rank for rank, dtype in enumerate(_KINDS)}


@dataclass
class _File:
    """One file while it is written: where each tensor begins, and how many bytes are still to come."""

    path: Path
    places: dict[str, int]
    missing: int
    descriptor: int
    unflushed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class TensorWriter:
    """Files of a folder that take tensors of a known layout. A context manager; `finish` says that all came.

    `layout` is split in its order into files of at most `shard_bytes`, with an index if there are several; a tensor
    that is larger gets a file of its own. `hashes` holds the SHA-256 of each file after `finish`. `title` begins the
    messages about tensors that do not fit the layout.
    """

    def __init__(self, folder: Path, layout: Layout, shard_bytes: int, title: str):
        self.folder, self.layout, self._title = folder, layout, title
        self.hashes: dict[str, str] = {}
        self._shards = _split(layout, shard_bytes)
        self._files: dict[str, _File] = {}
        self._file_of = {name: file for file, names in self._shards.items() for name in names}
        self._lock = threading.Lock()
        self._written: set[str] = set()
        self._behind = ThreadPoolExecutor(max_workers=1)
        self._hashing: dict[str, Future[str]] = {}
        self._flushing: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._behind.shutdown(wait=True, cancel_futures=kind is not None)
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place. Raises DamagedFile if the layout has no such tensor, or has it already."""
        problem = self._problem(name, tensor)
        if problem:
            raise DamagedFile(f"{self._title}: {problem}")
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        content = plain.view(torch.uint8).numpy().data if plain.numel() else memoryview(b"")
        with self._lock:
            self._written.add(name)
            file = self._opened(self._file_of[name])
        _write_at(file.descriptor, content, file.places[name])
        self._account(file, len(content))

    def finish(self) -> None:
        """Wait for the hashes and write the index. Raises DamagedFile naming the tensors that never came."""
        if missing := [f"missing {name}" for name in self.layout if name not in self._written]:
            raise DamagedFile(f"{self._title}: {shown(sorted(missing))}")
        for flushed in self._flushing:
            flushed.result()
        self.hashes = {name: self._hashing[name].result() for name in self._shards}
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor_bytes(*kind) for kind in self.layout.values())},
                "weight_map": self._file_of,
            }
            content = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
            write_atomic(self.folder / INDEX, content)
            self.hashes[INDEX] = hashlib.sha256(content).hexdigest()

    def _problem(self, name: str, tensor: Tensor) -> str | None:
        found = (tensor.dtype, tuple(tensor.shape))
        if name not in self.layout or name in self._written:
            return f"unexpected {name}"
        expected = self.layout[name]
        return None if found == expected else f"{name} is {described(*found)} and should be {described(*expected)}"

    def _opened(self, name: str) -> _File:
        if name not in self._files:
            self._files[name] = _start(self.folder / name, {one: self.layout[one] for one in self._shards[name]})
        return self._files[name]

    def _account(self, file: _File, count: int) -> None:
        """Let the disk begin early, and hash a file that is whole: both while others are being filled."""
        with file.lock:
            file.missing -= 1
            file.unflushed += count
            whole, flush = not file.missing, file.unflushed >= FLUSH_BYTES
            if flush:
                file.unflushed = 0
        if whole:
            self._hashing[file.path.name] = self._behind.submit(sha256_file, file.path)
        elif flush:
            self._flushing.append(self._behind.submit(os.fdatasync, file.descriptor))


def tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in a file."""
    return dtype.itemsize * torch.Size(shape).numel()


def described(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """A tensor's type and shape in words."""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def shown(problems: Iterable[str], most: int = 8) -> str:
    """The first problems of a list, and how many more there are."""
    listed = list(problems)
    more = f"; and {len(listed) - most} more" if len(listed) > most else ""
    return "; ".join(listed[:most]) + more


def _split(layout: Layout, shard_bytes: int) -> dict[str, list[str]]:
    """The names in each file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, kind in layout.items():
        size = tensor_bytes(*kind)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return dict(zip(files, shards, strict=True))


def _start(path: Path, layout: Layout) -> _File:
    """A new file with its header, and room for its tensors."""
    order = sorted(layout, key=lambda name: (_RANK[layout[name][0]], name.encode()))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name in order:
        dtype, shape = layout[name]
        begin, end = end, end + tensor_bytes(dtype, shape)
        places[name] = begin
        header[name] = {"dtype": _KINDS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    with explain_io_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.truncate(descriptor, start + end)
        _write_at(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
    return _File(path, {name: start + begin for name, begin in places.items()}, len(order), descriptor)


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while len(content):
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
