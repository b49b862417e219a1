"""Deltas: what changed between two versions of a set of stored tensors, bit by bit, in the target's own format.

Quantised first and compared afterwards, most of what an optimiser step moves is gone: an int8 weight changes only where
the step crosses a rounding. A message holds the changed tensors alone. Each is taken as integers of its element size;
the difference to the old value, modulo 2^bits and zigzag-coded so that small steps of both signs are small numbers, is
stored for the changed elements with their positions, or for all, whichever is shorter, byte plane by byte plane, and
compressed. The message names the versions and the hashes (formats/wire.py, `set_sha256`) of both whole sets, and the
hash of every tensor that it changes: what comes out is bit-equal to what went in, or an error.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.wire import hash_of_hashes
from isthmus.model.digest import tensor_sha256

MAGIC = b"ISTHMUS delta 1\n"
LEVEL = 3
SPARSE_BELOW = 0.2
"""Share of changed elements below which positions are stored: a position costs about as much as a few zero bytes."""
Codec = Literal["zstd", "zlib"]
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class Delta:
    """What a message says of itself, before it is applied."""

    base_version: int
    version: int
    base_sha256: str
    sha256: str
    changed: int


def hashes_of(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The hash of every tensor."""
    return {name: tensor_sha256(tensor) for name, tensor in tensors.items()}


def encode(
    old: dict[str, Tensor],
    new: dict[str, Tensor],
    *,
    base_version: int,
    version: int,
    old_hashes: dict[str, str] | None = None,
    codec: Codec = "zstd",
) -> tuple[bytes, dict[str, str]]:
    """The message that makes `new` of `old`, and the hashes of `new`. Raises IsthmusError if their layouts differ."""
    if {n: (t.dtype, t.shape) for n, t in old.items()} != {n: (t.dtype, t.shape) for n, t in new.items()}:
        raise IsthmusError("a delta is between two versions of the same tensors; send all of them instead")
    compress = _compressor(codec)
    old_hashes = hashes_of(old) if old_hashes is None else old_hashes
    new_hashes, entries, parts, offset = dict(old_hashes), {}, [], 0
    for name in sorted(new):
        before, after = _integers(old[name]), _integers(new[name])
        places = np.flatnonzero(before != after)
        if not len(places):
            continue
        entry, body = _encode_tensor(before, after, places, compress)
        new_hashes[name] = tensor_sha256(new[name])
        entries[name] = entry | {"offset": offset, "size": len(body), "sha256": new_hashes[name]}
        parts.append(body)
        offset += len(body)
    header = {
        "codec": codec,
        "base_version": base_version,
        "version": version,
        "base_sha256": hash_of_hashes(old_hashes),
        "sha256": hash_of_hashes(new_hashes),
        "tensors": entries,
    }
    packed = compress(json.dumps(header, separators=(",", ":"), sort_keys=True).encode())
    intro = bytes([list(_CODECS).index(codec)]) + len(packed).to_bytes(8, "little")
    return MAGIC + hashlib.sha256(intro + packed).digest() + intro + packed + b"".join(parts), new_hashes


def is_delta(payload: bytes) -> bool:
    """Whether a message is a delta, and not a whole set of tensors."""
    return payload.startswith(MAGIC)


def describe(payload: bytes) -> Delta:
    """The versions and hashes of a message. Raises DamagedFile if it is no delta."""
    header, _ = _open(payload)
    keys = ("base_version", "version", "base_sha256", "sha256")
    return Delta(*(header[key] for key in keys), changed=len(header["tensors"]))


def apply(
    payload: bytes, tensors: dict[str, Tensor], hashes: dict[str, str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The new set of tensors and its hashes; what did not change is shared with the old one, which is left as it is.

    Raises DamagedFile if the message is damaged, if `tensors` are not those it was made from, or if a tensor does not
    come out with its hash.
    """
    header, body = _open(payload)
    hashes = hashes_of(tensors) if hashes is None else hashes
    if hash_of_hashes(hashes) != header["base_sha256"]:
        raise DamagedFile(
            f"the delta to version {header['version']} was made from other weights than these "
            f"(version {header['base_version']}, SHA-256 {header['base_sha256'][:16]}...); take a full snapshot"
        )
    decompress = _decompressor(header["codec"])
    found, found_hashes = dict(tensors), dict(hashes)
    for name, entry in header["tensors"].items():
        part = body[entry["offset"] : entry["offset"] + entry["size"]]
        found[name] = _decode_tensor(name, entry, part, tensors[name], decompress)
        found_hashes[name] = tensor_sha256(found[name])
        if found_hashes[name] != entry["sha256"]:
            raise DamagedFile(f"{name} does not come out of the delta with its hash; send it again")
    if hash_of_hashes(found_hashes) != header["sha256"]:
        raise DamagedFile(f"the weights of version {header['version']} do not have the announced hash")
    return found, found_hashes


def _encode_tensor(
    before: np.ndarray, after: np.ndarray, places: np.ndarray, compress: Callable[[bytes], bytes]
) -> tuple[dict[str, Any], bytes]:
    if len(places) < SPARSE_BELOW * len(after):
        gaps = np.diff(places, prepend=0)
        size = next(size for size in (1, 2, 4, 8) if gaps.max() < 2 ** (8 * size))
        first = compress(_planes(gaps.astype(_UNSIGNED[size])))
        second = compress(_planes(_zigzag(after[places] - before[places])))
        entry = {"kind": "sparse", "count": len(places), "gap_bytes": size, "gaps": len(first)}
        return entry, first + second
    return {"kind": "dense"}, compress(_planes(_zigzag(after - before)))


def _decode_tensor(
    name: str, entry: dict[str, Any], part: bytes, old: Tensor, decompress: Callable[[bytes], bytes]
) -> Tensor:
    new = old.detach().clone().contiguous()
    values = _integers(new)
    try:
        if entry["kind"] == "sparse":
            kind = _UNSIGNED[entry["gap_bytes"]]
            gaps = _from_planes(decompress(part[: entry["gaps"]]), kind, entry["count"])
            places = np.cumsum(gaps, dtype=np.int64)
            steps = _from_planes(decompress(part[entry["gaps"] :]), values.dtype.type, entry["count"])
            values[places] += _unzigzag(steps)
        else:
            values += _unzigzag(_from_planes(decompress(part), values.dtype.type, len(values)))
    except (ValueError, IndexError, KeyError) as error:
        raise DamagedFile(f"the delta of {name} is damaged: {error}; send it again") from None
    return new


def _integers(tensor: Tensor) -> np.ndarray:
    """The elements of a tensor as unsigned integers of their size, flat; a view where the tensor is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    size = flat.element_size()
    return flat.view(torch.uint8).numpy().view(_UNSIGNED[size]) if flat.numel() else np.empty(0, _UNSIGNED[size])


def _zigzag(steps: np.ndarray) -> np.ndarray:
    """Small steps of either sign as small unsigned numbers."""
    signed = steps.view(_SIGNED[steps.itemsize])
    return ((signed << 1) ^ (signed >> (8 * steps.itemsize - 1))).view(steps.dtype)


def _unzigzag(coded: np.ndarray) -> np.ndarray:
    return (coded >> coded.dtype.type(1)) ^ (~(coded & coded.dtype.type(1)) + coded.dtype.type(1))


def _planes(values: np.ndarray) -> bytes:
    """The first bytes of all values, then the second ones, ..."""
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T).tobytes()


def _from_planes(data: bytes, kind: type, count: int) -> np.ndarray:
    planes = np.frombuffer(data, np.uint8).reshape(np.dtype(kind).itemsize, count)
    return np.ascontiguousarray(planes.T).reshape(-1).view(kind)


def _open(payload: bytes) -> tuple[dict[str, Any], bytes]:
    hashed = len(MAGIC) + 32
    start = hashed + 9
    end = start + int.from_bytes(payload[hashed + 1 : start], "little")
    if not is_delta(payload) or hashlib.sha256(payload[hashed:end]).digest() != payload[len(MAGIC) : hashed]:
        raise DamagedFile(f"the message ({len(payload):,} bytes) is no delta of weights, or a damaged one")
    codec = list(_CODECS)[payload[hashed]]
    return json.loads(_decompressor(codec)(payload[start:end])), payload[end:]


def _zstd_compressor() -> Callable[[bytes], bytes]:
    return _zstandard().ZstdCompressor(level=LEVEL).compress


def _zstd_decompressor() -> Callable[[bytes], bytes]:
    zstandard = _zstandard()

    def decompress(data: bytes) -> bytes:
        try:
            return zstandard.ZstdDecompressor().decompress(data)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None

    return decompress


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise IsthmusError("deltas in zstd need the package zstandard: pip install zstandard") from None
    return zstandard


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompress(data)
    except zlib.error as error:
        raise ValueError(str(error)) from None


_CODECS: dict[str, tuple[Callable[[], Callable[[bytes], bytes]], Callable[[], Callable[[bytes], bytes]]]] = {
    "zstd": (_zstd_compressor, _zstd_decompressor),
    "zlib": (lambda: lambda data: zlib.compress(data, 1), lambda: _inflate),
}


def _compressor(codec: Codec) -> Callable[[bytes], bytes]:
    return _CODECS[codec][0]()


def _decompressor(codec: str) -> Callable[[bytes], bytes]:
    if codec not in _CODECS:
        raise DamagedFile(f"the delta is compressed with {codec!r}, which is not known; known: {', '.join(_CODECS)}")
    return _CODECS[codec][1]()
