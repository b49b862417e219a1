"""Operator tables that follow versions: writing one from a wheel, and what differs between two."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from isthmus.chips.rehearse.tables import STATUSES, Status
from isthmus.chips.wheel.archive import PACKAGE
from isthmus.chips.wheel.registrations import Registrations
from isthmus.errors import IsthmusError
from isthmus.lines import csv_lines, explain_csv_errors, read_text
from isthmus.run import write_atomic

COLUMNS = ("operator", "status", "documented_dtypes", "documented_absent_on", "caution", "version", "source")
"""The columns of `chips/rehearse/FAMILY/operators.csv`."""
SOURCES = ("key", "standing", "source")


@dataclass(frozen=True)
class Difference:
    """What changed from one table to another, operators by name."""

    came: dict[str, Status]
    went: dict[str, Status]
    changed: dict[str, tuple[Status, Status]]

    def describe(self) -> list[str]:
        """The changes in words, one line for each kind."""
        lines = [
            *(f"{count} came, {status}" for status, count in Counter(self.came.values()).most_common()),
            *(f"{count} went, {status} before" for status, count in Counter(self.went.values()).most_common()),
        ]
        moves = Counter(self.changed.values()).most_common()
        return lines + [f"{count} changed from {old} to {new}" for (old, new), count in moves]


def compare(old: Mapping[str, Status], new: Mapping[str, Status]) -> Difference:
    """Operators that came, went, or are run in another way. Tables are `Registrations.statuses()` or `read_table`."""
    return Difference(
        came={name: new[name] for name in sorted(new.keys() - old.keys())},
        went={name: old[name] for name in sorted(old.keys() - new.keys())},
        changed={name: (old[name], new[name]) for name in sorted(old.keys() & new.keys()) if old[name] != new[name]},
    )


def read_table(path: Path) -> dict[str, Status]:
    """Operator and status from a file in the format of `operators.csv`. Raises IsthmusError for another format."""
    rows = _rows(path)
    for row in rows:
        if row["status"] not in STATUSES:
            raise IsthmusError(f"{path}: {row['operator']} has the status {row['status']!r}; write one of {STATUSES}")
    return {row["operator"]: cast(Status, row["status"]) for row in rows}


def write_table(registrations: Registrations, path: Path, documented: Path | None = None) -> None:
    """Write `path` as an `operators.csv` with the operators of a wheel, and a `sources.csv` beside it.

    A wheel does not say what its vendor documents: those columns are taken from `documented`, an older `operators.csv`
    with its `sources.csv`, or stay empty.
    """
    older = {row["operator"]: row for row in _rows(documented)} if documented else {}
    rows = []
    for name, one in sorted(registrations.operators.items()):
        known = older.get(name, {})
        row = {column: known.get(column, "") for column in COLUMNS}
        cited = [key for key in known.get("source", "").split("; ") if key not in ("", "wheel")]
        own = {
            "status": one.status,
            "version": f"{PACKAGE} {registrations.version}",
            "source": "; ".join(["wheel", *cited]),
        }
        rows.append({**row, "operator": name, **own})
    kept = _rows(documented.with_name("sources.csv"), SOURCES) if documented else []
    wheel = {"key": "wheel", "standing": "read in code", "source": registrations.source}
    _write(path, COLUMNS, rows)
    _write(path.with_name("sources.csv"), SOURCES, [wheel, *(row for row in kept if row["key"] != "wheel")])


def _rows(path: Path, columns: tuple[str, ...] = COLUMNS) -> list[dict[str, str]]:
    try:
        reader = csv.DictReader(csv_lines(read_text(path)))
    except OSError as error:
        raise IsthmusError(f"the table {path} cannot be read: {error}") from None
    with explain_csv_errors(path):
        if tuple(reader.fieldnames or ()) != columns:
            raise IsthmusError(f"{path} is not a table of operators: its columns must be {', '.join(columns)}")
        return list(reader)


def _write(path: Path, columns: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())
