"""A vendor's wheel as an archive: its tags and versions, and its libraries, checked against its own list of hashes."""

from __future__ import annotations

import base64
import csv
import hashlib
import platform
import re
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path, PurePosixPath

from isthmus.errors import IsthmusError
from isthmus.lines import csv_lines

PACKAGE = "torch_npu"
MAIN_LIBRARY = "libtorch_npu.so"
LARGEST_BYTES = 4 * 2**30
"""A wheel that unpacks to more is refused; torch_npu 2.13.0 takes 0.2 GB."""


@dataclass(frozen=True)
class WheelFacts:
    """What a wheel says about itself. `pythons` are tags such as cp311, `machines` such as x86_64 (empty: any)."""

    file: str
    version: str
    torch: str
    pythons: frozenset[str]
    machines: frozenset[str]


class Wheel:
    """An open wheel. Use it as a context; raises IsthmusError for what is not a whole, harmless wheel of torch_npu."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise IsthmusError(
                f"there is no wheel {path}; `pip download --no-deps {PACKAGE}==VERSION` gets one"
            ) from None
        except (zipfile.BadZipFile, OSError) as error:
            raise IsthmusError(f"{path} is not a whole wheel ({error}); download it again") from None
        with self._closed_on_error():
            self._entries = {one.filename: one for one in self._zip.infolist()}
            self._refuse_harmful()
            self._folder = self._dist_info()
            self._hashes = self._record()
            self.facts = self._facts()

    def __enter__(self) -> Wheel:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._zip.close()

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._zip.close()
            raise

    def libraries(self) -> list[str]:
        """Names in the archive of the package's own shared libraries: `lib/*.so` and its extension module."""
        inside = (PurePosixPath(name) for name in self._entries)
        own = [one for one in inside if one.suffix == ".so" and one.parts[0] == PACKAGE]
        return sorted(str(one) for one in own if one.parts[1] == "lib" or (len(one.parts) == 2 and "_C." in one.name))

    def read(self, name: str) -> bytes:
        """The bytes of one file, after comparing their SHA-256 with the wheel's RECORD."""
        content = self._content(name)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        if self._hashes.get(name) != f"sha256={digest}":
            raise IsthmusError(
                f"{name} in {self.path.name} is not what the wheel's RECORD lists; download the wheel again"
            )
        return content

    def unpack_libraries(self, folder: Path) -> None:
        """Write the package's shared libraries under `folder`, in their places in the archive."""
        for name in self.libraries():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(name))

    def _content(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            raise IsthmusError(f"{name} in {self.path} cannot be read ({error}); download the wheel again") from None

    def _refuse_harmful(self) -> None:
        for name, entry in self._entries.items():
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts or "\\" in name or not parts:
                raise IsthmusError(
                    f"{self.path.name} would write outside its folder ({name!r}): do not install this file"
                )
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise IsthmusError(
                    f"{self.path.name} contains a link ({name!r}), as no wheel does: do not install this file"
                )
        total = sum(entry.file_size for entry in self._entries.values())
        if total > LARGEST_BYTES:
            raise IsthmusError(
                f"{self.path.name} unpacks to {total / 2**30:.1f} GiB; more than 4 GiB is not a wheel of this"
            )

    def _dist_info(self) -> str:
        folders = {name.partition("/")[0] for name in self._entries if name.partition("/")[0].endswith(".dist-info")}
        if len(folders) != 1:
            raise IsthmusError(f"{self.path.name} is not a wheel: it has {len(folders)} folders of metadata, not one")
        return folders.pop()

    def _text(self, name: str) -> str:
        path = f"{self._folder}/{name}"
        if path not in self._entries:
            raise IsthmusError(f"{self.path.name} is not a whole wheel: it has no {path}")
        return self._content(path).decode("utf-8", "replace")

    def _record(self) -> dict[str, str]:
        rows = csv.reader(csv_lines(self._text("RECORD")))
        return {row[0]: row[1] for row in rows if len(row) > 1}

    def _facts(self) -> WheelFacts:
        about = HeaderParser().parsestr(self._text("METADATA"))
        name = str(about["Name"]).replace("-", "_")
        if name != PACKAGE:
            raise IsthmusError(f"{self.path.name} is a wheel of {name}; operators are read from wheels of {PACKAGE}")
        if f"{PACKAGE}/lib/{MAIN_LIBRARY}" not in self._entries:
            raise IsthmusError(f"{self.path.name} has no {PACKAGE}/lib/{MAIN_LIBRARY}, which registers the operators")
        tags = [tag.split("-") for tag in HeaderParser().parsestr(self._text("WHEEL")).get_all("Tag", [])]
        if any(len(tag) != 3 for tag in tags):
            raise IsthmusError(f"{self.path.name} has a tag that cannot be read in its WHEEL file")
        version = str(about["Version"])
        return WheelFacts(
            file=self.path.name,
            version=version,
            torch=_wanted_torch(about.get_all("Requires-Dist", []), version),
            pythons=frozenset(python for tag in tags for python in tag[0].split(".")),
            machines=frozenset(found for tag in tags for found in re.findall(r"x86_64|aarch64", tag[2])),
        )


def _wanted_torch(requirements: list[str], version: str) -> str:
    """The release of torch that a wheel names, or else that its own version begins with, as torch_npu's does."""
    exact = (re.match(r"torch\s*\(?==\s*(\d+(?:\.\d+)*)", one) for one in requirements)
    named = next((match[1] for match in exact if match), None)
    own = re.match(r"\d+\.\d+\.\d+", version)
    if named is None and own is None:
        raise IsthmusError(f"which torch {PACKAGE} {version} wants is not said in the wheel")
    return named or own[0]  # pyright: ignore[reportOptionalSubscript]


def check_loadable(facts: WheelFacts) -> None:
    """Raise IsthmusError unless this Python, machine and torch are those that the wheel was built for."""
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if here not in facts.pythons:
        wanted = ", ".join(sorted(facts.pythons))
        raise IsthmusError(
            f"{facts.file} was built for {wanted} and this is {here}: take the wheel for {here} "
            f"(`pip download --no-deps {PACKAGE}=={facts.version}`), or run this with the Python that it was built for"
        )
    if facts.machines and platform.machine() not in facts.machines:
        wanted = ", ".join(sorted(facts.machines))
        raise IsthmusError(
            f"{facts.file} was built for {wanted} and this machine is {platform.machine()}: take its wheel"
        )
    installed = metadata.version("torch")
    if installed.partition("+")[0] != facts.torch:
        raise IsthmusError(
            f"{PACKAGE} {facts.version} wants torch {facts.torch} and {installed} is installed: its kernels show only "
            f"beside that torch. Read it in an environment of its own, after `pip install torch=={facts.torch}`"
        )
