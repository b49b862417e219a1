"""A wheel and an installation held against a chip's tables: what `isthmus coverage --wheel FILE --cann DIR` adds."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

from isthmus.chips._registry import vendor_of
from isthmus.chips.rehearse.tables import Profile, Status
from isthmus.chips.wheel.archive import PACKAGE, Wheel
from isthmus.chips.wheel.registrations import read_wheel
from isthmus.chips.wheel.symbols import missing_symbols
from isthmus.chips.wheel.tables import compare, write_table
from isthmus.chips.wheel.versions import changes_since, check_versions, installed_cann
from isthmus.errors import IsthmusError

FAMILY = "ascend"
"""Whose software wheels of the package are."""


@dataclass(frozen=True)
class Software:
    """`profile` has the operators of the wheel, if one was given. `notes` say what was read and what differs;
    `warnings` what is wrong with it; `blocking` why it cannot even be imported."""

    profile: Profile
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    blocking: tuple[str, ...] = ()


def software_of(profile: Profile, wheel: Path | None, cann: Path | None, table: Path | None = None) -> Software:
    """The software of a chip as a wheel, an installation and the installed packages show it.

    `table` is written as an `operators.csv` with the wheel's operators. Without `wheel` and `cann` it is what the
    tables say, with the versions of an installed package checked.

    Raises IsthmusError for a chip of another vendor, and for what cannot be read.
    """
    if (wheel or cann) and vendor_of(profile.chip).rehearsal != FAMILY:
        raise IsthmusError(f"wheels and installations of {PACKAGE} are read, and {profile.chip} has other software")
    if table is not None and wheel is None:
        raise IsthmusError("a table is written from a wheel: name it with --wheel")
    installed = importlib.util.find_spec(PACKAGE)
    notes: list[str] = []
    if wheel is not None:
        profile, notes = _replaced(profile, wheel, table)
    warnings, blocking = _versions(profile, wheel, cann, installed is not None), []
    if cann is not None:
        package = wheel or (Path(installed.origin).parent if installed and installed.origin else None)
        if package is None:
            raise IsthmusError(
                f"--cann needs --wheel as well: {PACKAGE}, whose symbols it asks for, is not installed here"
            )
        missing = missing_symbols(package, cann)
        found = missing.describe()
        (warnings if missing.importable else blocking).extend(found)
        notes.append(
            f"{missing.needed - len(missing.linked) - len(missing.looked_up)} of {missing.needed} symbols found"
        )
    return Software(profile, tuple(notes), tuple(warnings), tuple(blocking))


def _replaced(profile: Profile, wheel: Path, path: Path | None) -> tuple[Profile, list[str]]:
    """The profile with the operators of a wheel, and in what they differ from those that it had."""
    read = read_wheel(wheel)
    if path is not None:
        write_table(read, path)
    before: dict[str, Status] = {name: row.status for name, row in profile.operators.items()}
    difference = compare(before, read.statuses())
    table = MappingProxyType(read.as_table(profile.operators))
    new = dataclasses.replace(profile, version=f"{PACKAGE} {read.version}", operators=table)
    counts = ", ".join(f"{count} {status}" for status, count in read.counts().items())
    lines = difference.describe() or ["the same operators, run in the same way"]
    lines += changes_since(profile.version.removeprefix(f"{PACKAGE} "), read.version)
    return new, [f"operators of {read.source}: {counts}", f"against the table of {profile.version}: {'; '.join(lines)}"]


def _versions(profile: Profile, wheel: Path | None, cann: Path | None, installed: bool) -> list[str]:
    """What the vendor's compatibility table says against the versions that are known."""
    if wheel is not None:
        with Wheel(wheel) as opened:
            version = opened.facts.version
    elif installed:
        version = metadata.version(PACKAGE)
    else:
        return []
    if vendor_of(profile.chip).rehearsal != FAMILY:
        return []
    return check_versions(metadata.version("torch"), version, installed_cann(cann) if cann else None)
