"""Writing a checkpoint shard by shard, from tensors that come one at a time: memory holds one or two shards.

Which tensors there will be, and so what every file holds, is known before the first one arrives. The files are what the
safetensors library writes: an 8-byte length, a JSON header, and the tensors, those of wide types first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.formats import Layout
from isthmus.formats.published import INDEX, WEIGHTS
from isthmus.run import write_atomic

STREAM_SHARD_BYTES = 192 << 20
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Shard:
    """A file to be: its tensors with dtype, shape and bytes."""

    file: str
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int]]


def plan_shards(layout: Layout, order: Iterable[str], shard_bytes: int) -> list[Shard]:
    """Files of up to `shard_bytes` (a larger tensor gets its own), in the order in which tensors will come."""
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...], int]]] = [{}]
    filled = 0
    for name in order:
        dtype, shape = layout[name]
        size = torch.empty(0, dtype=dtype).element_size()
        for extent in shape:
            size *= extent
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = (dtype, shape, size)
        filled += size
    if len(groups) == 1:
        return [Shard(WEIGHTS, groups[0])]
    return [Shard(f"model-{n:05d}-of-{len(groups):05d}.safetensors", group) for n, group in enumerate(groups, 1)]


def write_shards(folder: Path, shards: list[Shard], tensors: Iterator[tuple[str, Tensor]]) -> dict[str, str]:
    """Write the tensors, in whatever order they come, and the index; the SHA-256 of each file by its name.

    A full shard is written by another thread while the next one is filled. Raises IsthmusError if a tensor was not
    planned, does not fit its plan, or does not come.
    """
    shard_of = {name: number for number, shard in enumerate(shards) for name in shard.tensors}
    waiting: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(shards))}
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(1) as writer:
        running: Future[str] | None = None
        for name, tensor in tensors:
            number = shard_of.get(name)
            if number is None or shards[number].tensors[name][:2] != (tensor.dtype, tuple(tensor.shape)):
                raise IsthmusError(f"{name} ({tensor.dtype}, {list(tensor.shape)}) is not in the layout of this format")
            waiting[number][name] = tensor
            if len(waiting[number]) == len(shards[number].tensors):
                if running is not None:
                    running.result()
                running = writer.submit(_write_shard, folder, shards[number], waiting.pop(number), hashes)
        if running is not None:
            running.result()
    if missing := [name for number in waiting for name in shards[number].tensors if name not in waiting[number]]:
        raise IsthmusError(f"{len(missing)} tensors of the format did not come, the first is {missing[0]}")
    if len(shards) > 1:
        weight_map = {name: shard.file for shard in shards for name in shard.tensors}
        total = sum(size for shard in shards for _, _, size in shard.tensors.values())
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
        write_atomic(folder / INDEX, index.encode() + b"\n")
        hashes[INDEX] = hashlib.sha256(index.encode() + b"\n").hexdigest()
    return hashes


def _write_shard(folder: Path, shard: Shard, tensors: dict[str, Tensor], hashes: dict[str, str]) -> str:
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        dtype, shape, size = shard.tensors[name]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, start + size]}  # pyright: ignore
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hasher = hashlib.sha256()
    with (folder / shard.file).open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            hasher.update(part)
        for name in names:
            tensor = tensors.pop(name).contiguous()
            if tensor.numel():
                data = tensor.reshape(-1).view(torch.uint8).numpy().data
                file.write(data)
                hasher.update(data)
        file.flush()
        os.fsync(file.fileno())
    hashes[shard.file] = hasher.hexdigest()
    return shard.file
