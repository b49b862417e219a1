"""Which torch, torch_npu and CANN belong together, and how much changed between lines of the operator plugin."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from isthmus.errors import IsthmusError
from isthmus.lines import csv_rows


@dataclass(frozen=True)
class Build:
    """One row of the vendor's compatibility table."""

    torch_npu: str
    branch: str
    torch: str
    cann: str
    source: str


@dataclass(frozen=True)
class Churn:
    """What one line of the operator plugin changed against the line before it; None where there is none before."""

    line: str
    forked: str
    aten_added: int | None
    aten_removed: int | None
    custom_added: int | None
    custom_removed: int | None
    signatures_changed: int | None
    source: str


@functools.cache
def builds() -> tuple[Build, ...]:
    """The compatibility table, newest first."""
    return tuple(
        Build(
            torch_npu=row["torch_npu_package"].partition(" ")[0],
            branch=row["branch"],
            torch=row["torch_version"],
            cann=row["cann_version"].removeprefix("CANN "),
            source=row["source"],
        )
        for row in _rows("versions.csv")
    )


def check_versions(torch: str, torch_npu: str, cann: str | None) -> list[str]:
    """What is wrong with a combination, in words, each with what to install instead; empty if the vendor lists it.

    Versions are as the packages give them; what follows a `+` does not count. `cann` None means that it is not known:
    only torch and torch_npu are compared.
    """
    torch, torch_npu = torch.partition("+")[0], torch_npu.partition("+")[0]
    row = next((one for one in builds() if one.torch_npu == torch_npu), None)
    if row is None:
        return [_not_listed(torch, torch_npu), *_torch_by_name(torch, torch_npu)]
    problems = []
    if row.torch != torch:
        problems.append(
            f"torch_npu {torch_npu} is built for torch {row.torch}, and this is torch {torch}: {_for(torch)}"
        )
    if cann is not None and _same(cann) != _same(row.cann):
        others = [one for one in builds() if one.torch == row.torch and _same(one.cann) == _same(cann)]
        instead = f", or torch_npu {others[0].torch_npu} for CANN {cann}" if others else ""
        problems.append(
            f"torch_npu {torch_npu} belongs to CANN {row.cann}, and this is CANN {cann}: a wrong pair ends in an "
            f"undefined symbol at import. Install CANN {row.cann}{instead} ({row.source})"
        )
    return problems


def _not_listed(torch: str, torch_npu: str) -> str:
    newest = max((one.torch_npu for one in builds()), key=version_key)
    listed = [one for one in builds() if one.torch == torch]
    source = builds()[0].source
    if version_key(torch_npu) > version_key(newest):
        where = f"which ends at {newest} ({source})"
        return f"torch_npu {torch_npu} is newer than the vendor's table, {where}: its CANN is not known here"
    known = "; ".join(f"{one.torch_npu} with CANN {one.cann}" for one in listed)
    instead = f"for torch {torch} it lists {known}" if known else f"it lists nothing for torch {torch} either"
    return f"torch_npu {torch_npu} is not in the vendor's table ({source}); {instead}"


def _torch_by_name(torch: str, torch_npu: str) -> list[str]:
    """torch_npu's own version begins with that of the torch it is built for (every row of the table but one)."""
    release = re.match(r"\d+\.\d+\.\d+", torch_npu)
    if release and release[0] != torch:
        return [
            f"torch_npu {torch_npu} is by its name for torch {release[0]}, and this is torch {torch}: {_for(torch)}"
        ]
    return []


def _for(torch: str) -> str:
    found = next((one for one in builds() if one.torch == torch), None)
    if found is None:
        return f"the vendor's table lists no torch_npu for torch {torch}"
    return f"install torch_npu {found.torch_npu} with CANN {found.cann}"


def _same(version: str) -> str:
    return version.removeprefix("CANN ").strip().upper()


def version_key(version: str) -> tuple[tuple[int, int], ...]:
    """Order of versions such as 2.9.0.post2, 8.3.RC1 and 2.1.0.rc1: a release candidate comes before its release."""
    parts = re.findall(r"(rc|post)?(\d+)", version.lower())
    key = [(-1 if kind == "rc" else 0, int(number)) for kind, number in parts]
    return (*key, (0, 0)) if not any(kind for kind, _ in parts) else tuple(key)


def installed_cann(folder: Path) -> str | None:
    """The version of an installed CANN, from `<arch>-linux/ascend_toolkit_install.info`; None if it does not say.

    Raises IsthmusError if there is no such folder.
    """
    if not folder.is_dir():
        raise IsthmusError(
            f"there is no folder {folder}; give the folder of the installed CANN, as ASCEND_HOME_PATH names it"
        )
    for file in sorted(folder.glob("*-linux/ascend_toolkit_install.info")):
        found = re.search(r"^version=(\S+)", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if found:
            return found[1]
    return None


@functools.cache
def churn() -> tuple[Churn, ...]:
    """Lines of the operator plugin, oldest first."""
    return tuple(
        Churn(
            line=row["op_plugin_branch"],
            forked=row["forked_from_master"],
            aten_added=_number(row["aten_added"]),
            aten_removed=_number(row["aten_removed"]),
            custom_added=_number(row["custom_added"]),
            custom_removed=_number(row["custom_removed"]),
            signatures_changed=_number(row["custom_signature_changed"]),
            source=row["source"],
        )
        for row in _rows("churn.csv")
    )


def changed_between(old: str, new: str) -> list[str]:
    """What a move from one line of the operator plugin to a later one brings, line by line, in words.

    A line is the end of a branch, 26.0.0 of v2.9.0-26.0.0 for example. Raises IsthmusError for an unknown line.
    """
    lines = [one.line for one in churn()]
    for asked in (old, new):
        if asked not in lines:
            raise IsthmusError(f"there is no line {asked!r} of the operator plugin; the lines are {', '.join(lines)}")
    if lines.index(old) > lines.index(new):
        raise IsthmusError(f"{old} is later than {new}: name the older line first")
    return [_said(one) for one in churn()[lines.index(old) + 1 : lines.index(new) + 1]]


def changes_since(old: str, new: str) -> list[str]:
    """What the operator plugin changed between two versions of torch_npu, where the tables know the lines of both."""
    lines = [_line_of(version) for version in (old, new)]
    known = [one.line for one in churn()]
    if any(line not in known for line in lines) or known.index(str(lines[0])) > known.index(str(lines[1])):
        return []
    return changed_between(str(lines[0]), str(lines[1]))


def _line_of(torch_npu: str) -> str | None:
    row = next((one for one in builds() if one.torch_npu == torch_npu), None)
    return row.branch.rpartition("-")[2] if row else None


def _said(one: Churn) -> str:
    return (
        f"{one.line} (from {one.forked}): operators of torch +{one.aten_added} -{one.aten_removed}, the vendor's own "
        f"+{one.custom_added} -{one.custom_removed}, signatures changed in {one.signatures_changed} ({one.source})"
    )


def _number(text: str) -> int | None:
    return int(text) if text else None


def _rows(name: str) -> list[dict[str, str]]:
    text = (resources.files("isthmus.chips.wheel") / name).read_text(encoding="utf-8")
    return csv_rows(text)
