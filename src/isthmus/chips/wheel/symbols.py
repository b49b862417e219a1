"""The symbols that a package needs from the vendor's system software, against those that an installation provides.

Files are read, nothing is loaded, and no special rights are needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isthmus.chips.wheel.archive import MAIN_LIBRARY, PACKAGE, Wheel
from isthmus.chips.wheel.elf import Image, SharedLibrary, machine_of, mapped, read_elf, strings_like
from isthmus.chips.wheel.stubs import missing_from_here, reached_from, torch_libraries
from isthmus.errors import IsthmusError

WORKSPACE = "GetWorkspaceSize"


@dataclass(frozen=True)
class Needed:
    """What a package needs. Without `libraries` and `linked` symbols it cannot be imported; a name that is `looked_up`
    and not found makes its operator fail when it is called, or take an older path."""

    machine: str
    libraries: frozenset[str]
    linked: frozenset[str]
    looked_up: frozenset[str]

    @property
    def symbols(self) -> frozenset[str]:
        return self.linked | self.looked_up


@dataclass(frozen=True)
class Provided:
    """What an installation has: file names and symbols of its shared libraries for one kind of machine."""

    libraries: frozenset[str]
    symbols: frozenset[str]


@dataclass(frozen=True)
class Missing:
    """What a package needs and an installation does not have."""

    libraries: tuple[str, ...]
    linked: tuple[str, ...]
    looked_up: tuple[str, ...]
    needed: int

    @property
    def importable(self) -> bool:
        return not self.libraries and not self.linked

    def describe(self) -> list[str]:
        """The problems in words; none if nothing is missing."""
        problems = []
        if self.libraries:
            problems.append(f"the import fails: {', '.join(self.libraries)} not found")
        if self.linked:
            problems.append(f"the import fails: undefined symbols {_some(self.linked)}")
        if self.looked_up:
            problems.append(
                f"{len(self.looked_up)} of {self.needed} needed symbols are looked up when their operator is called, "
                f"and are not there: {_some(self.looked_up)}"
            )
        return problems


def _some(names: tuple[str, ...], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def operators_looked_up(image: Image) -> frozenset[str]:
    """Operators of the system software that a library looks up by name.

    They are `aclnnX` together with `aclnnXGetWorkspaceSize`, which the two-phase interface always asks for.
    """
    names = strings_like(rb"aclnn[A-Z]\w*", image)
    return frozenset(name for name in names if name + WORKSPACE in names)


def needed_symbols(package: Path) -> frozenset[str]:
    """Every symbol that torch_npu, a wheel or the folder of an installed package, needs from the system software."""
    return needs(package).symbols


def needs(package: Path) -> Needed:
    """The same, told apart by what happens without it. Raises IsthmusError for what is neither wheel nor package."""
    own: dict[str, SharedLibrary] = {}
    looked_up: frozenset[str] = frozenset()
    for name, image in _images(package):
        own[name] = read_elf(image, name)
        if name == MAIN_LIBRARY:
            looked_up = operators_looked_up(image)
    if MAIN_LIBRARY not in own:
        raise IsthmusError(f"{package} is not {PACKAGE}: it has no lib/{MAIN_LIBRARY}")
    extension = [library for name, library in own.items() if name.startswith("_C.")]
    loaded = [*reached_from(MAIN_LIBRARY, own), *extension]
    torch = torch_libraries()
    libraries, symbols = missing_from_here(loaded, torch.values(), [*own, *torch])
    linked = frozenset(name for name in symbols if not name.startswith("_Z"))
    return Needed(own[MAIN_LIBRARY].machine, frozenset(libraries), linked, looked_up)


def _images(package: Path) -> Iterator[tuple[str, Image]]:
    if package.is_dir():
        for file in sorted([*package.glob("lib/*.so"), *package.glob("_C.*.so")]):
            with mapped(file) as image:
                yield file.name, image
        return
    with Wheel(package) as wheel:
        for name in wheel.libraries():
            yield Path(name).name, wheel.read(name)


def provided_symbols(cann: Path, machine: str) -> frozenset[str]:
    """Every symbol that the shared libraries under an installed CANN define for one kind of machine."""
    return provides(cann, machine).symbols


def provides(cann: Path, machine: str) -> Provided:
    """File names and symbols of the shared libraries under a folder. Files that are not shared libraries for `machine`
    (linker scripts, the libraries of the chip's own cores) are passed over. Raises IsthmusError if there is none."""
    if not cann.is_dir():
        raise IsthmusError(
            f"there is no folder {cann}; give the folder of the installed CANN, as ASCEND_HOME_PATH names it"
        )
    names, read = set[str](), dict[tuple[int, int], SharedLibrary | None]()
    for file in _library_files(cann):
        status = file.stat()
        same = (status.st_dev, status.st_ino)
        if same not in read:
            with mapped(file) as image:
                read[same] = read_elf(image, str(file)) if machine_of(image) == machine else None
        if read[same] is not None:
            names.add(file.name)
    found = [library for library in read.values() if library is not None]
    if not found:
        raise IsthmusError(f"there are no shared libraries for {machine} under {cann}")
    names.update(library.soname for library in found if library.soname)
    return Provided(frozenset(names), frozenset().union(*(library.defined for library in found)))


def _library_files(folder: Path) -> Iterator[Path]:
    """Files named `*.so` or `*.so.N` below a folder, through links to folders too, each folder once."""
    entered = set[str]()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        for name in sorted(files):
            file = Path(root) / name
            if (name.endswith(".so") or ".so." in name) and file.is_file():
                yield file


def missing_symbols(package: Path, cann: Path) -> Missing:
    """What torch_npu (a wheel, or the folder of an installed package) needs that the CANN under a folder lacks."""
    needed = needs(package)
    provided = provides(cann, needed.machine)
    return Missing(
        libraries=tuple(sorted(needed.libraries - provided.libraries)),
        linked=tuple(sorted(needed.linked - provided.symbols)),
        looked_up=tuple(sorted(needed.looked_up - provided.symbols)),
        needed=len(needed.symbols),
    )
