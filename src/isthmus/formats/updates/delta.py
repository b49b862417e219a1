"""What changed between two versions of a set of stored tensors: a lossless message, checked by hash on both ends.

The difference is taken between stored tensors, that is after quantisation, so that a weight whose int8 value stays the
same costs nothing. Elements are compared as integers of their bit patterns: NaNs and signed zeros count like any other
pattern. The difference of two patterns (wrapped around, then folded so that -1, 1, -2, ... become 1, 2, 3, ...) is
small where a weight moved by a few units in the last place. Per tensor the smallest of these is sent:

    nothing   no element changed
    sparse    the gaps between changed elements, and their differences
    dense     the difference of every element
    full      the new elements

each split into byte planes, one stream per plane, which is compressed where that makes it smaller. A message is

    magic 8 | length of all 8 | length of header 4 | header | streams | SHA-256 of everything before 32

with little-endian lengths; the header is compressed JSON. One message may be split into parts, each of this form.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import zstandard
from torch import Tensor

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.updates.wire import set_sha256
from isthmus.model.digest import tensor_sha256

Method = Literal["sparse", "dense", "full"]

MAGIC = b"ISTHMDL1"
PART_BYTES = 64 << 20
_PREFIX, _HASH_BYTES = struct.Struct("<8sQI"), 32
_PLAIN, _ZSTD = "raw", "zstd"
_ZSTD_LEVEL = 1
_LARGEST_HEADER = 64 << 20
NEVER_SPARSE, ONLY_SPARSE = 0.6, 0.25
"""Shares of changed elements: up to the second the sparse form is the smaller one (`forms` in benchmarks/deltas.py);
above the first it is not tried. In between both are."""
_FULL_FROM = 0.75
"""Share of the tensor's size from which on the new elements themselves are tried too."""
_WIDTHS = (1, 2, 4, 8)


class WrongBase(IsthmusError):
    """A delta changes other weights than those at hand."""


@dataclass(frozen=True)
class WeightSet:
    """Stored tensors of one version, with the hash of each. They must not be changed in place."""

    version: int
    tensors: dict[str, Tensor]
    hashes: dict[str, str]

    @classmethod
    def of(cls, version: int, tensors: dict[str, Tensor]) -> WeightSet:
        """Hash every tensor."""
        return cls(version, tensors, {name: tensor_sha256(tensor) for name, tensor in tensors.items()})

    @cached_property
    def sha256(self) -> str:
        """`set_sha256` of the tensors."""
        return set_sha256(self.hashes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, which a full update sends."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@dataclass(frozen=True)
class Entry:
    """One changed tensor. `count` are the elements that are sent, `gap` the bytes of a position's gap (sparse).

    `streams` are codec and length of each stream: planes of the gaps, then of the elements. `sha256` is
    `tensor_sha256` of the result.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    method: Method
    count: int
    gap: int
    streams: list[tuple[str, int]]
    sha256: str


@dataclass(frozen=True)
class Header:
    """What a message changes. Without a base it is a snapshot: every tensor, in full.

    `base_sha256` and `sha256` are `set_sha256` of all tensors before and after, also of those that did not change.
    """

    base_version: int | None
    version: int
    base_sha256: str | None
    sha256: str
    part: int
    parts: int
    entries: list[Entry] = field(default_factory=list)


@dataclass(frozen=True)
class Message:
    """One message or one part, whole by its hash; not yet compared with any weights."""

    header: Header
    streams: memoryview


def encode(base: WeightSet | None, new: WeightSet, *, part_bytes: int = PART_BYTES) -> list[bytes]:
    """The message that turns `base` into `new`, in parts of about `part_bytes`, at least one tensor each.

    Without a base it is a snapshot. Raises IsthmusError if the two have different tensors, dtypes or shapes: then only
    a snapshot can be sent. Beside the result, the memory that this needs is a few times the largest tensor.
    """
    if base is not None:
        _require_same_layout(base, new)
    squeeze = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress
    groups: list[tuple[list[Entry], list[bytes]]] = [([], [])]
    size = 0
    for name in sorted(new.tensors):
        if base is not None and base.hashes[name] == new.hashes[name]:
            continue
        old = None if base is None else base.tensors[name]
        entry, streams = _encode_tensor(name, old, new.tensors[name], new.hashes[name], squeeze)
        length = sum(map(len, streams))
        if size and size + length > part_bytes:
            groups.append(([], []))
            size = 0
        groups[-1][0].append(entry)
        groups[-1][1].extend(streams)
        size += length
    origin = (None, None) if base is None else (base.version, base.sha256)
    headers = [
        Header(origin[0], new.version, origin[1], new.sha256, part, len(groups), entries)
        for part, (entries, _) in enumerate(groups)
    ]
    return [_assemble(header, streams) for header, (_, streams) in zip(headers, groups, strict=True)]


def is_message(payload: bytes) -> bool:
    """Whether bytes begin as a message of this file does."""
    return payload[: len(MAGIC)] == MAGIC


def read_message(payload: bytes) -> Message:
    """Check the hash of a message and read its header. Raises DamagedFile."""
    if len(payload) < _PREFIX.size + _HASH_BYTES or not is_message(payload):
        raise DamagedFile(f"{len(payload):,} bytes that should be a weight delta are not one; send it again")
    _, length, header_length = _PREFIX.unpack_from(payload)
    if length != len(payload):
        raise DamagedFile(f"a weight delta has {len(payload):,} of its {length:,} bytes; send it again")
    view = memoryview(payload)
    if hashlib.sha256(view[:-_HASH_BYTES]).digest() != payload[-_HASH_BYTES:]:
        raise DamagedFile("a weight delta does not have the SHA-256 that stands at its end; send it again")
    end = _PREFIX.size + header_length
    return Message(_read_header(payload[_PREFIX.size : end]), view[end:-_HASH_BYTES])


def split_messages(content: bytes) -> list[bytes]:
    """The parts of a message that were written one after the other. Raises DamagedFile."""
    parts, place = [], 0
    while place < len(content):
        if len(content) - place < _PREFIX.size:
            raise DamagedFile("a weight delta ends in the middle of a part")
        magic, length, _ = _PREFIX.unpack_from(content, place)
        if magic != MAGIC or not _PREFIX.size < length <= len(content) - place:
            raise DamagedFile(f"a weight delta is damaged at byte {place:,}")
        parts.append(content[place : place + length])
        place += length
    return parts


def decode(message: Message, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changed tensors of a message, each checked by its hash. `base` are the tensors that it changes.

    Raises DamagedFile if they do not come out as the sender had them.
    """
    found: dict[str, Tensor] = {}
    place = 0
    for entry in message.header.entries:
        length = sum(size for _, size in entry.streams)
        streams = message.streams[place : place + length]
        if len(streams) != length:
            raise DamagedFile(f"the delta of {entry.name} is cut short")
        try:
            found[entry.name] = _decode_tensor(entry, streams, base.get(entry.name), message.header.base_version)
        except (ValueError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise DamagedFile(f"the delta of {entry.name} cannot be read: {error}") from None
        place += length
        if tensor_sha256(found[entry.name]) != entry.sha256:
            raise DamagedFile(f"{entry.name} has another SHA-256 after the delta than the sender's; send it again")
    return found


def check_base(header: Header, version: int | None, sha256: str | None) -> None:
    """Raise WrongBase unless a delta changes these weights. A snapshot has no base and fits always."""
    if header.base_version is None:
        return
    if (header.base_version, header.base_sha256) != (version, sha256):
        held = "none" if version is None or sha256 is None else f"version {version} ({sha256[:16]}...)"
        raise WrongBase(
            f"the delta to version {header.version} changes version {header.base_version} "
            f"({str(header.base_sha256)[:16]}...), and the weights here are {held}; send a snapshot"
        )


def apply(base: WeightSet | None, payloads: Sequence[bytes]) -> WeightSet:
    """The weights after all parts of one message; `base` stays as it is. Lossless, or refused.

    Raises WrongBase if it changes other weights, DamagedFile if a part is damaged, missing or of another message.
    """
    messages = [read_message(payload) for payload in payloads]
    check_parts([message.header for message in messages])
    header = messages[0].header
    check_base(header, base and base.version, base and base.sha256)
    tensors, hashes = (dict(base.tensors), dict(base.hashes)) if base and header.base_version is not None else ({}, {})
    for message in messages:
        tensors |= decode(message, tensors)
        hashes |= {entry.name: entry.sha256 for entry in message.header.entries}
    result = WeightSet(header.version, tensors, hashes)
    if result.sha256 != header.sha256:
        raise DamagedFile(
            f"version {header.version} has the SHA-256 {result.sha256[:16]}... after the delta, the sender's has "
            f"{header.sha256[:16]}...; send a snapshot"
        )
    return result


def check_parts(headers: Sequence[Header]) -> None:
    """Raise DamagedFile unless these are all parts of one message, in any order."""
    kinds = {(one.base_version, one.version, one.base_sha256, one.sha256, one.parts) for one in headers}
    if len(kinds) != 1 or sorted(one.part for one in headers) != list(range(headers[0].parts)):
        raise DamagedFile("the parts of a weight delta are incomplete, or belong to different messages")


def _require_same_layout(base: WeightSet, new: WeightSet) -> None:
    for name in base.tensors.keys() | new.tensors.keys():
        old, now = base.tensors.get(name), new.tensors.get(name)
        if old is None or now is None or old.dtype != now.dtype or old.shape != now.shape:
            raise IsthmusError(
                f"{name} is not the same kind of tensor in versions {base.version} and {new.version}; send a snapshot"
            )


def _encode_tensor(
    name: str, old: Tensor | None, new: Tensor, sha256: str, squeeze: Callable[[bytes], bytes]
) -> tuple[Entry, list[bytes]]:
    def compressed(planes: Iterable[bytes]) -> list[tuple[str, bytes]]:
        return [_smaller(plane, squeeze) for plane in planes]

    elements = _elements(new)
    forms: list[tuple[Method, int, int, list[tuple[str, bytes]]]] = []
    if old is not None:
        folded = _fold(elements - _elements(old))
        changed = np.flatnonzero(folded != 0)
        share = len(changed) / max(len(elements), 1)
        if share <= NEVER_SPARSE:
            gaps = _gaps(changed)
            planes = [*_planes(gaps), *_planes(folded[changed])]
            forms.append(("sparse", len(changed), gaps.itemsize, compressed(planes)))
        if share > ONLY_SPARSE:
            forms.append(("dense", len(elements), 0, compressed(_planes(folded))))
    if old is None or _size(min(forms, key=lambda form: _size(form[3]))[3]) > _FULL_FROM * elements.nbytes:
        forms.append(("full", len(elements), 0, compressed(_planes(elements))))
    method, count, gap, streams = min(forms, key=lambda form: _size(form[3]))
    dtype, shape = str(new.dtype).removeprefix("torch."), tuple(new.shape)
    lengths = [(kind, len(stream)) for kind, stream in streams]
    return Entry(name, dtype, shape, method, count, gap, lengths, sha256), [stream for _, stream in streams]


def _decode_tensor(entry: Entry, streams: memoryview, old: Tensor | None, base_version: int | None) -> Tensor:
    dtype = getattr(torch, entry.dtype)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {entry.dtype!r}")
    if base_version is not None and (old is None or old.dtype != dtype or tuple(old.shape) != entry.shape):
        raise ValueError("the weights at hand have no such tensor")
    total = int(np.prod(entry.shape, dtype=np.int64)) * dtype.itemsize
    kind = _unsigned(dtype.itemsize)
    size = total // kind.itemsize
    if (entry.method != "sparse" and entry.count != size) or not 0 <= entry.count <= size:
        raise ValueError(f"{entry.count} elements for {size}")
    parts = _expand(entry, streams, kind.itemsize)
    gap_planes = entry.gap if entry.method == "sparse" else 0
    values = _join(parts[gap_planes:], kind, entry.count)
    if entry.method == "full":
        return _tensor(values, dtype, entry.shape)
    if old is None:
        raise ValueError("a snapshot must hold every tensor in full")
    if entry.method == "dense":
        return _tensor(_elements(old) + _unfold(values), dtype, entry.shape)
    elements = _elements(old).copy()
    gaps = _join(parts[:gap_planes], _unsigned(entry.gap), entry.count)
    positions = np.cumsum(gaps.astype(np.int64) + 1) - 1
    elements[positions] += _unfold(values)
    return _tensor(elements, dtype, entry.shape)


def _expand(entry: Entry, streams: memoryview, width: int) -> list[bytes]:
    """Every plane has one byte per element that is sent: what would expand to more is refused unread."""
    expected = width + (entry.gap if entry.method == "sparse" else 0)
    if len(entry.streams) != expected or (entry.method == "sparse" and entry.gap not in _WIDTHS):
        raise ValueError(f"{len(entry.streams)} streams, {expected} were expected")
    planes, place = [], 0
    for codec, length in entry.streams:
        planes.append(_decompress(codec, bytes(streams[place : place + length]), entry.count))
        place += length
    return planes


def _elements(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The bit patterns of a tensor [elements] as unsigned integers; where it can, a view."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().view(_unsigned(plain.element_size()))


def _tensor(elements: np.ndarray[Any, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(elements.view(np.uint8)).view(dtype).reshape(shape)


def _unsigned(width: int) -> np.dtype[Any]:
    return np.dtype(f"<u{width}" if width in _WIDTHS else "u1")


def _fold(difference: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Signed to unsigned so that small ones stay small: 0, -1, 1, -2 become 0, 1, 2, 3."""
    signed = difference.view(difference.dtype.str.replace("u", "i"))
    return ((signed << 1) ^ (signed >> (8 * signed.itemsize - 1))).view(difference.dtype)


def _unfold(folded: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (folded >> 1) ^ (~(folded & 1) + 1)


def _gaps(positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Unchanged elements before each changed one, in the narrowest integers."""
    gaps = np.diff(positions, prepend=-1) - 1
    largest = int(gaps.max()) if len(gaps) else 0
    width = next(width for width in _WIDTHS if largest < 1 << (8 * width))
    return gaps.astype(_unsigned(width))


def _planes(elements: np.ndarray[Any, Any]) -> list[bytes]:
    table = elements.view(np.uint8).reshape(-1, elements.itemsize)
    return [table[:, place].tobytes() for place in range(elements.itemsize)]


def _join(planes: list[bytes], kind: np.dtype[Any], count: int) -> np.ndarray[Any, Any]:
    table = np.empty((count, kind.itemsize), np.uint8)
    for place, plane in enumerate(planes):
        table[:, place] = np.frombuffer(plane, np.uint8)
    return table.reshape(-1).view(kind)


def _size(streams: list[tuple[str, bytes]]) -> int:
    return sum(len(stream) for _, stream in streams)


def _smaller(plane: bytes, squeeze: Callable[[bytes], bytes]) -> tuple[str, bytes]:
    packed = squeeze(plane)
    return (_ZSTD, packed) if len(packed) < len(plane) else (_PLAIN, plane)


def _decompress(codec: str, packed: bytes, length: int) -> bytes:
    """Exactly `length` bytes; ValueError if it would be another number."""
    if codec == _PLAIN:
        plain = packed
    elif codec == _ZSTD:
        plain = _decompress_zstd(packed, length)
    else:
        raise ValueError(f"unknown compression {codec!r}")
    if len(plain) != length:
        raise ValueError(f"a stream has {len(plain):,} bytes, {length:,} were announced")
    return plain


def _decompress_zstd(packed: bytes, length: int) -> bytes:
    try:
        announced = zstandard.get_frame_parameters(packed).content_size
        if announced != length:
            raise ValueError(f"a stream announces {announced:,} bytes, {length:,} were expected")
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=length)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


def _assemble(header: Header, streams: list[bytes]) -> bytes:
    content = asdict(header)
    content["entries"] = [list(entry.values()) for entry in content["entries"]]
    # The header must be readable before anything is known about the other side: always zlib, which Python has.
    packed = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 6)
    body = b"".join([packed, *streams])
    head = _PREFIX.pack(MAGIC, _PREFIX.size + len(body) + _HASH_BYTES, len(packed))
    return b"".join([head, body, hashlib.sha256(head + body).digest()])


def _read_header(packed: bytes) -> Header:
    try:
        content = json.loads(zlib.decompressobj().decompress(packed, _LARGEST_HEADER))
        entries = [_read_entry(values) for values in content.pop("entries")]
        header = Header(**content, entries=entries)
        _require_types(header)
        return header
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, zlib.error) as error:
        raise DamagedFile(f"the header of a weight delta cannot be read: {error}") from None


def _require_types(header: Header) -> None:
    numbers = [
        header.version,
        header.part,
        header.parts,
        *([] if header.base_version is None else [header.base_version]),
    ]
    texts = [header.sha256, *([] if header.base_sha256 is None else [header.base_sha256])]
    if any(type(one) is not int or one < 0 for one in numbers) or not all(isinstance(one, str) for one in texts):
        raise ValueError("a version, a part or a hash is of another type")


def _read_entry(values: list[Any]) -> Entry:
    entry = Entry(*values)
    if not isinstance(entry.sha256, str) or entry.dtype.startswith("_"):
        raise ValueError(f"{entry.name} has no hash or no dtype")
    streams = [(str(codec), int(length)) for codec, length in entry.streams]
    if entry.method not in ("sparse", "dense", "full") or any(length < 0 for _, length in streams):
        raise ValueError(f"{entry.name} is sent in an unknown way")
    shape = tuple(int(size) for size in entry.shape)
    return Entry(
        str(entry.name), str(entry.dtype), shape, entry.method, int(entry.count), int(entry.gap), streams, entry.sha256
    )
