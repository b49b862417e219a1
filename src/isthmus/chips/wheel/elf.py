"""What a shared library needs and provides, read from its ELF sections without loading it.

pyelftools reads them. Only the symbols, of which a large library has a hundred thousand, are unpacked here, for speed.
Layout: System V gABI, "Symbol Table"; symbol versions: Linux Standard Base 5.0, chapter 10.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import mmap
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from isthmus.errors import IsthmusError

Image: TypeAlias = bytes | mmap.mmap
_IDENTITY = b"\x7fELF\x02\x01"
"""How a 64-bit little-endian file begins."""
_SYMBOL = struct.Struct("<IBBHQQ")
_ENTRY_BYTES = 16
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
    if image[:6] != _IDENTITY or len(image) < 20:
        return None
    (machine,) = struct.unpack_from("<H", image, 18)
    return MACHINES.get(machine, f"machine {machine}")


def read_elf(image: Image, name: str) -> SharedLibrary:
    """The symbols of a 64-bit little-endian ELF file. `name` is for messages.

    Raises IsthmusError for anything else, and if pyelftools is not installed.
    """
    if importlib.util.find_spec("elftools") is None:
        raise IsthmusError(
            "reading the libraries of a vendor's software needs pyelftools, which is not installed. "
            "Install it with: pip install 'isthmus[vendor-wheels]'"
        )
    from elftools.common.exceptions import ELFError

    machine = machine_of(image)
    if machine is None:
        raise IsthmusError(f"{name} is not a 64-bit little-endian ELF file, and no other kind can be read")
    try:
        sections = _sections(image)
        if "SHT_DYNSYM" not in sections:
            raise IsthmusError(f"{name} has no table of dynamic symbols, so what it needs cannot be read")
        return SharedLibrary(machine, *_names(sections), *_symbols(image, sections))
    except (ELFError, AssertionError, ValueError, OverflowError, struct.error) as error:
        raise IsthmusError(f"{name} is damaged: its ELF tables leave the file or disagree ({error!r})") from None


def _sections(image: Image) -> dict[str, Any]:
    """The sections that are read, by type. pyelftools looks into whatever it opens, so the others stay closed."""
    from elftools.common.utils import struct_parse
    from elftools.elf.elffile import ELFFile

    elf = ELFFile(io.BytesIO(image) if isinstance(image, bytes) else image)  # pyright: ignore[reportArgumentType]
    start, step, first = elf["e_shoff"], elf["e_shentsize"], dict[str, int]()
    for index in reversed(range(elf.num_sections())):  # the last first: a table longer than the file fails at once
        first[struct_parse(elf.structs.Elf_Shdr, elf.stream, start + index * step).sh_type] = index
    read = first.keys() & {"SHT_DYNSYM", "SHT_DYNAMIC", "SHT_GNU_versym", "SHT_GNU_verneed"}
    return {kind: elf.get_section(first[kind]) for kind in read}


def _names(sections: dict[str, Any]) -> tuple[str | None, tuple[str, ...], frozenset[str]]:
    """Its own name, the libraries that it needs, and those of them of which it names versions."""
    dynamic, verneed = sections.get("SHT_DYNAMIC"), sections.get("SHT_GNU_verneed")
    tags = list(itertools.islice(dynamic.iter_tags(), dynamic["sh_size"] // _ENTRY_BYTES)) if dynamic else []
    versions = itertools.islice(verneed.iter_versions(), verneed["sh_size"] // _ENTRY_BYTES) if verneed else ()
    soname = next((tag.soname for tag in tags if tag["d_tag"] == "DT_SONAME"), None)
    needed = tuple(tag.needed for tag in tags if tag["d_tag"] == "DT_NEEDED")
    versioned = frozenset(version.name for version, _ in versions)
    if "" in (soname, *needed, *versioned):
        raise ValueError("the name of a library has no end")
    return soname, needed, versioned


def _symbols(image: Image, sections: dict[str, Any]) -> tuple[frozenset[str], frozenset[str]]:
    table, strings = (_content(image, one) for one in (sections["SHT_DYNSYM"], sections["SHT_DYNSYM"].stringtable))
    versions = [0] * (len(table) // _SYMBOL.size)
    if "SHT_GNU_versym" in sections:
        versions = struct.unpack(f"<{len(versions)}H", _content(image, sections["SHT_GNU_versym"]))
    defined, undefined = set[str](), set[str]()
    for (name, info, _, home, _, _), version in zip(_SYMBOL.iter_unpack(table), versions, strict=True):
        binding, text = info >> 4, strings[name : strings.index(b"\x00", name)].decode("utf-8", "replace")
        if home and binding in (_GLOBAL, _WEAK):
            defined.add(text)
        elif binding == _GLOBAL and version & 0x7FFF <= _VERSION_OF_NOTHING:
            undefined.add(text)
    return frozenset(defined), frozenset(undefined - defined)


def _content(image: Image, section: Any) -> bytes:
    start, end = section["sh_offset"], section["sh_offset"] + section["sh_size"]
    if end > len(image):
        raise ValueError(f"{section.name} ends at byte {end} of {len(image)}")
    return image[start:end]


def strings_like(pattern: bytes, image: Image) -> set[str]:
    """Whole zero-terminated strings of a file that match a pattern: names that a program looks up while it runs."""
    return {match.decode() for match in re.findall(rb"(?<=\x00)" + pattern + rb"(?=\x00)", image)}
