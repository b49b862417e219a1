"""What a shared library needs and provides, read from its ELF sections without loading it.

Layout: System V gABI, "Object Files" and "Dynamic Linking"; symbol versions: Linux Standard Base 5.0, chapter 10.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from isthmus.errors import IsthmusError

Image: TypeAlias = bytes | mmap.mmap
_MAGIC, _CLASS_64, _LITTLE = b"\x7fELF", 2, 1
_DYNAMIC, _DYNSYM, _VERSYM, _VERNEED = 6, 11, 0x6FFFFFFF, 0x6FFFFFFE
_DT_NEEDED, _DT_SONAME = 1, 14
_GLOBAL, _WEAK = 1, 2
_VERSION_OF_NOTHING = 1
MACHINES = {62: "x86_64", 183: "aarch64"}


@dataclass(frozen=True)
class SharedLibrary:
    """The dynamic symbols of one shared library.

    `undefined` are those that others must provide before it loads; weak ones, which may stay absent, and those bound to
    a version of a named library, as the C library's are, do not count. `versioned` are the libraries of the latter.
    """

    machine: str
    soname: str | None
    needed: tuple[str, ...]
    versioned: frozenset[str]
    defined: frozenset[str]
    undefined: frozenset[str]


@dataclass(frozen=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int
    count: int


@contextmanager
def mapped(file: Path) -> Iterator[Image]:
    """The bytes of a file, read as they are looked at."""
    with file.open("rb") as opened:
        if os.fstat(opened.fileno()).st_size == 0:
            yield b""
            return
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as image:
            yield image


def machine_of(image: Image) -> str | None:
    """The processor for which a 64-bit ELF file was made, `x86_64` for example; None for any other file."""
    if bytes(image[:6]) != _MAGIC + bytes((_CLASS_64, _LITTLE)) or len(image) < 20:
        return None
    (machine,) = struct.unpack_from("<H", image, 18)
    return MACHINES.get(machine, f"machine {machine}")


def read_elf(image: Image, name: str) -> SharedLibrary:
    """The symbols of a 64-bit little-endian ELF file. `name` is for messages. Raises IsthmusError for anything else."""
    if bytes(image[:4]) != _MAGIC:
        raise IsthmusError(f"{name} is not a shared library: it does not begin as an ELF file does")
    if bytes(image[4:6]) != bytes((_CLASS_64, _LITTLE)):
        raise IsthmusError(f"{name} is not a 64-bit little-endian ELF file, and no other kind can be read")
    try:
        return _read(image, name)
    except (struct.error, ValueError, IndexError) as error:
        raise IsthmusError(f"{name} is damaged: its ELF tables point outside the file ({error})") from None


def _read(image: Image, name: str) -> SharedLibrary:
    sections = _sections(image)
    symbols = next((one for one in sections if one.kind == _DYNSYM), None)
    if symbols is None:
        raise IsthmusError(f"{name} has no table of dynamic symbols, so what it needs cannot be read")
    versions = next((one for one in sections if one.kind == _VERSYM), None)
    defined, undefined = _symbols(image, sections, symbols, versions)
    dynamic = next((one for one in sections if one.kind == _DYNAMIC), None)
    entries = list(_dynamic(image, sections, dynamic)) if dynamic else []
    return SharedLibrary(
        machine=machine_of(image) or "unknown",
        soname=next((text for tag, text in entries if tag == _DT_SONAME), None),
        needed=tuple(text for tag, text in entries if tag == _DT_NEEDED),
        versioned=frozenset(_versioned(image, sections)),
        defined=frozenset(defined),
        undefined=frozenset(undefined - defined),
    )


def _sections(image: Image) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", image, 40)
    entry, count = struct.unpack_from("<HH", image, 58)
    sections = []
    for index in range(count):
        fields = struct.unpack_from("<IIQQQQIIQQ", image, table + index * entry)
        sections.append(_Section(kind=fields[1], offset=fields[4], size=fields[5], link=fields[6], count=fields[7]))
    return sections


def _symbols(
    image: Image, sections: list[_Section], symbols: _Section, versions: _Section | None
) -> tuple[set[str], set[str]]:
    strings = sections[symbols.link].offset
    defined, undefined = set[str](), set[str]()
    for index in range(1, symbols.size // 24):
        name, info, _, home, _, _ = struct.unpack_from("<IBBHQQ", image, symbols.offset + 24 * index)
        if info >> 4 not in (_GLOBAL, _WEAK):
            continue
        text = _text(image, strings + name)
        if home:
            defined.add(text)
        elif info >> 4 == _GLOBAL and not _has_version(image, versions, index):
            undefined.add(text)
    return defined, undefined


def _has_version(image: Image, versions: _Section | None, index: int) -> bool:
    if versions is None:
        return False
    (version,) = struct.unpack_from("<H", image, versions.offset + 2 * index)
    return version & 0x7FFF > _VERSION_OF_NOTHING


def _dynamic(image: Image, sections: list[_Section], dynamic: _Section) -> Iterator[tuple[int, str]]:
    strings = sections[dynamic.link].offset
    for index in range(dynamic.size // 16):
        tag, value = struct.unpack_from("<qQ", image, dynamic.offset + 16 * index)
        if tag in (_DT_NEEDED, _DT_SONAME):
            yield tag, _text(image, strings + value)


def _versioned(image: Image, sections: list[_Section]) -> Iterator[str]:
    for section in sections:
        at = section.offset
        for _ in range(section.count if section.kind == _VERNEED else 0):
            _, _, file, _, step = struct.unpack_from("<HHIII", image, at)
            yield _text(image, sections[section.link].offset + file)
            at += step


def _text(image: Image, at: int) -> str:
    end = image.find(b"\x00", at)
    if end < 0 or at >= len(image):
        raise ValueError(f"a name at byte {at} has no end")
    return bytes(image[at:end]).decode("utf-8", "replace")


def strings_like(pattern: bytes, image: Image) -> set[str]:
    """Whole zero-terminated strings of a file that match a pattern: names that a program looks up while it runs."""
    return {match.decode() for match in re.findall(rb"(?<=\x00)" + pattern + rb"(?=\x00)", image)}
