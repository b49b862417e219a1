"""A vendor's wheel of torch_npu, read without a chip: its operators, its symbols, and which versions belong together.

What `isthmus coverage` calls:

- `software_of(profile, wheel, cann)` holds a wheel and an installation against a chip's tables, by what follows.
- `read_wheel(path)` gives `Registrations`: every operator with its status as in `rehearse/ascend/operators.csv`
  (`.operators`, `.counts()`, `.custom`, `.source`). `.as_table(profile.operators)` gives rows that replace the
  operators of a `rehearse.Profile`; `.statuses()` is what `compare` takes.
- `compare(old, new)` gives what came, went or changed between two tables; `read_table(path)` reads one from a file in
  the package's format and `write_table(registrations, path, documented)` writes one.
- `missing_symbols(wheel_or_package, cann)` gives what an installed CANN lacks (`.importable`, `.describe()`);
  `needed_symbols` and `provided_symbols` are its two sides. Nothing is loaded for it.
- `check_versions(torch, torch_npu, cann)` gives problems in words, `installed_cann(folder)` the version of an
  installation, `changed_between(old, new)` what a newer line of the operator plugin brings.

Everything raises IsthmusError for bad input. Nothing here loads torch into this process: `read_wheel` starts another.
"""

from __future__ import annotations

from isthmus.chips.wheel.against import Software, software_of
from isthmus.chips.wheel.registrations import Registered, Registrations, read_wheel
from isthmus.chips.wheel.symbols import Missing, missing_symbols, needed_symbols, provided_symbols
from isthmus.chips.wheel.tables import Difference, compare, read_table, write_table
from isthmus.chips.wheel.versions import Build, Churn, builds, changed_between, check_versions, churn, installed_cann

__all__ = [
    "Build",
    "Churn",
    "Difference",
    "Missing",
    "Registered",
    "Registrations",
    "Software",
    "builds",
    "changed_between",
    "check_versions",
    "churn",
    "compare",
    "installed_cann",
    "missing_symbols",
    "needed_symbols",
    "provided_symbols",
    "read_table",
    "read_wheel",
    "software_of",
    "write_table",
]
