"""The shared layout of versions, as engines read it: `weight_v000123/`, a Hugging Face folder, whole or as a delta.

    model.safetensors.index.json     metadata: version, base_version, delta_encoding, compression_format,
                                     checksum_format; and which file holds which tensor
    model-00000-of-00002.safetensors the tensors. In a delta: per changed tensor its compressed bytes

`delta_encoding` is `xor` (of the bytes before and after) or `overwrite` (count, positions, new bytes; 32 bits each). A
folder whose index names no base holds whole tensors. `sha256.json` has the hash of every tensor after the version;
where another trainer wrote none, the checksums in the files' metadata are compared: of each changed tensor as a whole.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import struct
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

INDEX, HASHES = "model.safetensors.index.json", "sha256.json"
TIMEOUT_S = 120.0


class Unusable(Exception):
    """A version that cannot be used: it is damaged, changes other weights, or is written in a way unknown here."""


@dataclass(frozen=True)
class Index:
    """What a version says of itself. `files` say where what was sent lies; `hashes` are those of all tensors after it,
    None where another trainer wrote none."""

    version: int
    base_version: int | None
    encoding: str
    compression: str
    checksums: str
    files: dict[str, str]
    hashes: dict[str, str] | None


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and the row-major bytes, hexadecimal."""
    plain = tensor.detach().cpu().contiguous()
    hasher = hashlib.sha256(f"{str(plain.dtype).removeprefix('torch.')}{tuple(plain.shape)}".encode())
    if plain.numel():
        hasher.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def reader(source: str) -> Callable[[str], bytes]:
    """Reads files of a version by name: `source` is a folder, or the URL of one."""
    if source.startswith(("http://", "https://")):
        return lambda name: _fetched(f"{source.rstrip('/')}/{name}")
    return lambda name: _read(Path(source) / name)


def read_index(read: Callable[[str], bytes]) -> Index:
    """Raises Unusable if it is none, or names files outside of its folder."""
    try:
        index = json.loads(read(INDEX))
        facts, files = index["metadata"], dict(index["weight_map"])
        base = facts.get("base_version")
        found = Index(
            int(facts["version"]),
            None if base is None else int(base),
            str(facts.get("delta_encoding")),
            str(facts.get("compression_format")),
            str(facts.get("checksum_format")),
            {str(name): str(file) for name, file in files.items()},
            _hashes(read) if facts.get("isthmus") else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"the index of the version cannot be read: {error!r}") from None
    if strange := [file for file in found.files.values() if "/" in file or "\\" in file or file.startswith(".")]:
        raise Unusable(f"the index of the version names {strange[0]}, which is no file of its folder")
    return found


def _hashes(read: Callable[[str], bytes]) -> dict[str, str]:
    return {str(name): str(one) for name, one in json.loads(read(HASHES)).items()}


def read_version(source: str, held_version: int | None, held: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """The version at `source` and all its tensors, each with the hash that was announced; `held` stay as they are.

    Raises Unusable.
    """
    read = reader(source)
    index = read_index(read)
    if index.base_version is not None and index.base_version != held_version:
        raise Unusable(
            f"the delta to version {index.version} changes version {index.base_version}, and "
            f"{'nothing' if held_version is None else f'version {held_version}'} is here"
        )
    tensors = {} if index.base_version is None else dict(held)
    for file in sorted(set(index.files.values())):
        tensors |= _of_file(read(file), file, index, held)
    if index.hashes is not None:
        _compare(index, index.hashes, tensors)
    return index.version, tensors


def _compare(index: Index, hashes: dict[str, str], tensors: dict[str, Tensor]) -> None:
    for name in sorted(hashes.keys() ^ tensors.keys()):
        raise Unusable(f"{name} is {'missing' if name in hashes else 'not announced'} in version {index.version}")
    for name, tensor in tensors.items():
        if tensor_sha256(tensor) != hashes[name]:
            raise Unusable(f"{name} has another SHA-256 than version {index.version} announces")


def _of_file(content: bytes, file: str, index: Index, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        sent = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise Unusable(f"{file} of version {index.version} cannot be read: {error}") from None
    if strange := sorted(name for name in sent if index.files.get(name) != file):
        raise Unusable(f"{file} of version {index.version} holds {strange[0]}, which its index does not say")
    if index.base_version is not None:
        sent = {name: _changed(name, packed, index, held) for name, packed in sent.items()}
    if index.hashes is None:
        _compare_sums(content, file, index, sent)
    return sent


def _compare_sums(content: bytes, file: str, index: Index, tensors: dict[str, Tensor]) -> None:
    (length,) = struct.unpack_from("<Q", content)
    sums = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    for name, tensor in tensors.items():
        if name not in sums:
            raise Unusable(f"{file} of version {index.version} has no checksum of {name}")
        if checksum(index.checksums, tensor) != sums[name]:
            raise Unusable(f"{name} has another checksum than version {index.version} announces")


def checksum(kind: str, tensor: Tensor) -> str:
    """Of a tensor's bytes: adler32, or blake3 or xxh3-128 where the environment has them. Raises Unusable."""
    plain = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    if kind == "adler32":
        return f"{zlib.adler32(plain):08x}"
    module, function = {"blake3": ("blake3", "blake3"), "xxh3-128": ("xxhash", "xxh3_128")}.get(kind, ("", ""))
    if not module:
        raise Unusable(f"unknown checksums {kind!r}")
    try:
        return getattr(importlib.import_module(module), function)(plain).hexdigest()
    except ImportError:
        raise Unusable(f"checksums are {kind}: install {module} in this environment") from None


def _changed(name: str, packed: Tensor, index: Index, held: Mapping[str, Tensor]) -> Tensor:
    old = held.get(name)
    if old is None:
        raise Unusable(f"the delta to version {index.version} changes {name}, which is not here")
    try:
        delta = expand(packed.numpy().tobytes(), index.compression, limit=12 * old.numel() * old.element_size() + 64)
        return apply_delta(old, delta, index.encoding)
    except (ValueError, RuntimeError, struct.error, zlib.error) as error:
        raise Unusable(f"the delta of {name} to version {index.version} cannot be read: {error}") from None


def apply_delta(old: Tensor, delta: bytes, encoding: str) -> Tensor:
    """A tensor of the same type and shape. Raises ValueError if the delta does not fit it."""
    flat = old.contiguous().reshape(-1).view(torch.uint8)
    if encoding == "xor":
        if len(delta) != flat.numel():
            raise ValueError(f"{len(delta):,} bytes for {flat.numel():,}")
        new = flat ^ torch.frombuffer(bytearray(delta), dtype=torch.uint8) if delta else flat.clone()
    elif encoding == "overwrite":
        new = _overwritten(flat, delta)
    else:
        raise ValueError(f"unknown encoding {encoding!r}")
    return new.view(old.dtype).reshape(old.shape)


def _overwritten(flat: Tensor, delta: bytes) -> Tensor:
    (count,) = struct.unpack_from("<I", delta)
    if len(delta) != 4 + 5 * count:
        raise ValueError(f"{len(delta):,} bytes for {count:,} changed ones")
    new = flat.clone()
    if count:
        content = torch.frombuffer(bytearray(delta), dtype=torch.uint8)
        where = content[4 : 4 + 4 * count].clone().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        if int(where.max()) >= flat.numel():
            raise ValueError("a position beyond the end")
        new[where] = content[4 + 4 * count :]
    return new


def expand(packed: bytes, compression: str, limit: int) -> bytes:
    """At most `limit` bytes. zstd needs the module `zstandard`, or a Python that has it. Raises ValueError."""
    if compression == "zlib":
        unpacker = zlib.decompressobj()
        plain = unpacker.decompress(packed, limit)
        if not unpacker.eof:
            raise ValueError(f"it is cut short, or has more than {limit:,} bytes")
        return plain
    if compression != "zstd":
        raise ValueError(f"unknown compression {compression!r}")
    zstandard: Any = _module_of_zstd()
    try:
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=limit)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


def _module_of_zstd() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        raise ValueError("this environment reads no zstd: install zstandard, or let zlib be written") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {error}") from None


def _fetched(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            announced, content = response.headers.get("Content-Length"), response.read()
    except (OSError, ValueError, HTTPException) as error:
        raise Unusable(f"{url} cannot be fetched: {error!r}") from None
    if announced is not None and len(content) != int(announced):
        raise Unusable(f"{url} ended after {len(content):,} of {int(announced):,} bytes")
    return content
