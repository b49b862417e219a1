"""Versions of weights as SGLang, slime and miles exchange them: a folder `weight_v000123/` for each, which is a Hugging
Face checkpoint of what changed.

    model.safetensors.index.json       {"metadata": {version, base_version, delta_encoding, compression_format,
                                       checksum_format}, "weight_map": {name: file}}
    model-00000-of-00001.safetensors   per changed tensor its compressed bytes, and in the metadata the checksum of the
                                       whole tensor after the version

`xor` are the bytes before and after; `overwrite` is the number of changed bytes, their positions and their values, 32
bits for number and position. Beside them stands `sha256.json` with the hash of every tensor after the version, for our
own readers, to whom `isthmus` in the metadata says so. Without a base the folder holds whole tensors.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
import zstandard
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.formats.updates.delta import WeightSet
from isthmus.formats.updates.publisher import Published
from isthmus.run import new_folder

Encoding = Literal["xor", "overwrite"]
Compression = Literal["zstd", "zlib"]
INDEX, HASHES = "model.safetensors.index.json", "sha256.json"
SHARD_BYTES = 1 << 30
_LEVEL = 1


def version_folder(folder: Path, version: int) -> Path:
    """Where a version lies among others."""
    return folder / f"weight_v{version:06d}"


def write_version(
    folder: Path,
    base: WeightSet | None,
    new: WeightSet,
    *,
    encoding: Encoding = "xor",
    compression: Compression = "zstd",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write what leads from `base` to `new`, or all of `new`, below `folder`; a reader sees all of it or nothing.

    SGLang and miles read zstd; zlib is for readers with Python's own library alone. Raises IsthmusError if the two have
    different tensors: then it must be written whole.
    """
    sent = _whole(new) if base is None else _changes(base, new, encoding, _compressor(compression))
    shards = _shards(sent, shard_bytes)
    names = [f"model-{place:05d}-of-{len(shards):05d}.safetensors" for place in range(len(shards))]
    target = version_folder(folder, new.version)
    with new_folder(target) as written:
        for file, shard in zip(names, shards, strict=True):
            sums = {name: f"{zlib.adler32(_bytes(new.tensors[name]).data):08x}" for name in shard}
            (written / file).write_bytes(safetensors.torch.save(shard, metadata=sums))
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        (written / HASHES).write_text(json.dumps(new.hashes), encoding="utf-8")
        index = {"metadata": _facts(base, new, encoding, compression), "weight_map": where}
        (written / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return target


class SharedWriter:
    """The sender's side of a folder of versions. The first, and each that is due whole, has all tensors; who reads has
    to keep up with the others. None is removed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._last: WeightSet | None = None

    def write(self, published: Published) -> Path:
        """Add a version."""
        last, self._last = self._last, published.weights
        follows = last is not None and published.base == (last.version, last.sha256) and not published.snapshot_due
        return write_version(self.folder, last if follows else None, published.weights)


def _facts(base: WeightSet | None, new: WeightSet, encoding: str, compression: str) -> dict[str, str | None]:
    facts: dict[str, str | None] = {"version": f"{new.version:06d}", "checksum_format": "adler32", "isthmus": "1"}
    if base is None:
        return facts | {"base_version": None, "delta_encoding": None, "compression_format": None}
    own = {"delta_encoding": encoding, "compression_format": compression}
    return facts | {"base_version": f"{base.version:06d}", **own}


def _whole(new: WeightSet) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in new.tensors.items()}


def _changes(
    base: WeightSet, new: WeightSet, encoding: Encoding, squeeze: Callable[[bytes], bytes]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in sorted(base.tensors.keys() | new.tensors.keys()):
        old, now = base.tensors.get(name), new.tensors.get(name)
        if old is None or now is None or old.dtype != now.dtype or old.shape != now.shape:
            raise IsthmusError(f"{name} is another kind of tensor in version {base.version}; write it whole")
        if base.hashes[name] != new.hashes[name]:
            delta = _xor(_bytes(old), _bytes(now)) if encoding == "xor" else _overwrite(_bytes(old), _bytes(now))
            found[name] = torch.frombuffer(bytearray(squeeze(delta)), dtype=torch.uint8)
    return found


def _xor(old: np.ndarray, new: np.ndarray) -> bytes:
    return (old ^ new).tobytes()


def _overwrite(old: np.ndarray, new: np.ndarray) -> bytes:
    if len(new) > 0xFFFFFFFF:
        raise IsthmusError(f"a tensor of {len(new):,} bytes has positions that 32 bits cannot tell; use xor")
    where = np.flatnonzero(old != new)
    return np.array([len(where)], "<u4").tobytes() + where.astype("<u4").tobytes() + new[where].tobytes()


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _compressor(compression: Compression) -> Callable[[bytes], bytes]:
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=_LEVEL).compress
    return lambda plain: zlib.compress(plain, _LEVEL)


def _shards(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """In files of about so many bytes; none for nothing."""
    shards: list[dict[str, Tensor]] = []
    size = 0
    for name, tensor in tensors.items():
        if not shards or size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards
