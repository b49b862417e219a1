"""Stand-ins for the vendor's system libraries: every symbol that a package needs from them, doing nothing."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from isthmus.chips.wheel.elf import SharedLibrary, mapped, read_elf
from isthmus.errors import IsthmusError

COMPILE_SECONDS = 60
_SYSTEM_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


def torch_libraries() -> dict[str, SharedLibrary]:
    """The shared libraries of the installed torch by file name, read without importing it."""
    folder = Path(str(metadata.distribution("torch").locate_file("torch/lib")))
    files = sorted(file for file in folder.glob("*.so*") if file.is_file())
    if not files:
        raise IsthmusError(f"the installed torch has no shared libraries in {folder}")
    found = {}
    for file in files:
        with mapped(file) as image:
            found[file.name] = read_elf(image, file.name)
    return found


def reached_from(main: str, libraries: dict[str, SharedLibrary]) -> list[SharedLibrary]:
    """A library and those of its own package that it loads, and they load in turn."""
    reached, waiting = dict[str, SharedLibrary](), [main]
    while waiting:
        name = waiting.pop()
        if name in libraries and name not in reached:
            reached[name] = libraries[name]
            waiting += libraries[name].needed
    return list(reached.values())


def missing_from_here(
    libraries: Iterable[SharedLibrary], present: Iterable[SharedLibrary], names: Iterable[str]
) -> tuple[set[str], set[str]]:
    """Which libraries and symbols neither the package itself, nor those `present` (by `names`), nor this system has."""
    libraries, present = list(libraries), list(present)
    bound_by_version = set[str]().union(*(one.versioned for one in libraries))
    wanted = set[str]().union(*(one.needed for one in libraries)) - set(names) - bound_by_version
    symbols = set[str]().union(*(one.undefined for one in libraries))
    symbols -= set[str]().union(*(one.defined for one in (*libraries, *present)))
    here = ctypes.CDLL(None)
    return {name for name in wanted if not _system_has(name)}, {name for name in symbols if not hasattr(here, name)}


def _system_has(name: str) -> bool:
    multiarch = sysconfig.get_config_var("MULTIARCH")
    folders = [Path(base) for base in _SYSTEM_FOLDERS]
    folders += [folder / multiarch for folder in folders if multiarch]
    return any((folder / name).exists() for folder in folders)


def build_stubs(symbols: set[str], libraries: set[str], folder: Path) -> None:
    """Compile one library that defines `symbols` as functions that return 0, and give it the name of every library.

    Raises IsthmusError if there is no C compiler, or it fails.
    """
    source, built = folder / "stubs.c", folder / "stubs.so"
    source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(symbols)) or "int nothing;\n")
    command = [*_compiler(), "-shared", "-fPIC", "-w", "-fno-builtin", "-o", str(built), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise IsthmusError(f"{command[0]} did not compile the stand-in library in {COMPILE_SECONDS} s") from None
    if done.returncode:
        raise IsthmusError(f"{command[0]} cannot compile the stand-in library:\n{done.stderr.strip()[-2000:]}")
    for name in libraries:
        (folder / name).symlink_to(built.name)


def _compiler() -> list[str]:
    named = os.environ.get("CC", "").split()
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    raise IsthmusError(
        f"reading a wheel needs a C compiler for stand-ins of the vendor's libraries, and "
        f"{' '.join(named) or 'none of cc, gcc and clang'} is not here: install one (such as the package gcc), "
        "or name it in the environment variable CC"
    )
