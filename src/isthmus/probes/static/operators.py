"""Which operators a model needs, and which of them a chip's software has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from isthmus.chips.rehearse.tables import STATUSES, Profile, Status


@dataclass(frozen=True)
class Support:
    """Operators that are called, joined with a chip's operator table. Names are sorted.

    `refused_dtypes` and `weak_dtypes` name the operators that were called with such a dtype.
    """

    operators: dict[Status, tuple[str, ...]]
    cautions: dict[str, tuple[str, ...]]
    refused_dtypes: dict[str, tuple[str, ...]]
    weak_dtypes: dict[str, tuple[str, ...]]
    source: str

    @property
    def total(self) -> int:
        return sum(map(len, self.operators.values()))

    def count(self, status: Status) -> int:
        return len(self.operators[status])


def support_of(called: Mapping[str, set[str]], profile: Profile) -> Support:
    """What the chip's software does with each operator that is called; `called` has the dtypes of each."""
    by_status: dict[Status, list[str]] = {status: [] for status in STATUSES}
    for name in sorted(called):
        by_status[profile.status(name)].append(name)
    known = {name: profile.operators[name] for name in sorted(called) if name in profile.operators}
    return Support(
        operators={status: tuple(names) for status, names in by_status.items()},
        cautions={name: row.cautions for name, row in known.items() if row.cautions},
        refused_dtypes=_ruled_dtypes(called, profile, refused=True),
        weak_dtypes=_ruled_dtypes(called, profile, refused=False),
        source=f"the operator table of {profile.chip} ({profile.version})",
    )


def _ruled_dtypes(called: Mapping[str, set[str]], profile: Profile, *, refused: bool) -> dict[str, tuple[str, ...]]:
    """Of each dtype that has a rule, the operators that it is refused in, or those that take it and are weak with it.

    Where a dtype is replaced, an operator does not compute in it.
    """
    ruled = {
        dtype: tuple(
            sorted(
                name
                for name, seen in called.items()
                if dtype in seen and (rule.action == "substitute" or rule.refuses(name)) == refused
            )
        )
        for dtype, rule in profile.dtypes.items()
    }
    return {dtype: names for dtype, names in ruled.items() if names}
