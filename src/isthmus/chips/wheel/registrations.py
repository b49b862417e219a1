"""What a vendor's wheel registers with torch, operator by operator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from isthmus.chips.rehearse.tables import STATUSES, Operator, Status
from isthmus.chips.wheel.archive import MAIN_LIBRARY, PACKAGE, Wheel, WheelFacts, check_loadable
from isthmus.chips.wheel.elf import SharedLibrary, mapped, read_elf
from isthmus.chips.wheel.stubs import build_stubs, missing_from_here, reached_from, torch_libraries
from isthmus.chips.wheel.symbols import operators_looked_up
from isthmus.errors import IsthmusError

MEMORY_BYTES = 4 * 2**30
"""Private memory of the process that loads the library; torch_npu 2.13.0 takes 0.3 GB beside torch."""
SECONDS = 120
WALL_SECONDS = 2 * SECONDS


@dataclass(frozen=True)
class Registered:
    """One operator. `via` is the overload through which torch computes it, where that decided the status; `schema` is
    there for operators that the wheel itself defines. `at` is the place in the source that registered what runs."""

    name: str
    status: Status
    via: str | None
    at: str
    custom: bool
    schema: str | None


@dataclass(frozen=True)
class Registrations:
    """Everything that one wheel registers.

    `operators` are torch's own (`aten::`) and those that the wheel defines, by name. `kernels`, `autograd` and
    `autocast` are the names for which it brings a kernel of that kind, operators or not. `looked_up` are the operators
    of the vendor's system software that it looks up by name while it runs. `stubbed` symbols were missing here.
    """

    version: str
    torch: str
    file: str
    operators: dict[str, Registered]
    kernels: frozenset[str]
    autograd: frozenset[str]
    autocast: frozenset[str]
    looked_up: frozenset[str]
    stubbed: frozenset[str]

    @property
    def custom(self) -> dict[str, Registered]:
        """The operators that the wheel itself defines."""
        return {name: one for name, one in self.operators.items() if one.custom}

    @property
    def source(self) -> str:
        return f"{self.file}, registrations read under torch {self.torch}"

    def counts(self) -> dict[Status, int]:
        """Number of torch's own operators by status."""
        found = Counter(one.status for one in self.operators.values() if not one.custom)
        return {status: found[status] for status in STATUSES if found[status]}

    def statuses(self) -> dict[str, Status]:
        return {name: one.status for name, one in self.operators.items()}

    def as_table(self, documented: Mapping[str, Operator] | None = None) -> dict[str, Operator]:
        """The operators as rows of a rehearsal's table. What a wheel cannot say (dtypes and limits that the vendor
        documents) is taken from `documented`, an older table, or left empty."""
        older = documented or {}
        return {
            name: Operator(
                name=name,
                status=one.status,
                documented_dtypes=older[name].documented_dtypes if name in older else (),
                cautions=older[name].cautions if name in older else (),
                version=f"{PACKAGE} {self.version}",
                standing="read in code",
                source=self.source,
            )
            for name, one in sorted(self.operators.items())
        }


def read_wheel(path: Path) -> Registrations:
    """Load a wheel of torch_npu beside the installed torch, in a process of its own, and read what it registers.

    The vendor's system software need not be here: symbols that it would provide are replaced by functions that do
    nothing, so nothing can be executed afterwards. The library's start-up code does run: read only wheels that you
    would install. Needs a C compiler, and the torch and the Python that the wheel was built for; raises IsthmusError
    otherwise.
    """
    with Wheel(path) as wheel, tempfile.TemporaryDirectory(prefix="isthmus-wheel-") as scratch:
        check_loadable(wheel.facts)
        folder = Path(scratch)
        wheel.unpack_libraries(folder)
        stubs = folder / "stubs"
        stubs.mkdir()
        own: dict[str, SharedLibrary] = {}
        for name in wheel.libraries():
            with mapped(folder / name) as image:
                own[Path(name).name] = read_elf(image, name)
        stubbed = _stand_in(own, stubs)
        library = folder / PACKAGE / "lib" / MAIN_LIBRARY
        answer = _load(wheel.facts, library, stubs)
        with mapped(library) as image:
            looked_up = operators_looked_up(image)
    return registrations(wheel.facts, answer, looked_up, frozenset(stubbed))


def _stand_in(own: dict[str, SharedLibrary], folder: Path) -> set[str]:
    torch = torch_libraries()
    loaded = reached_from(MAIN_LIBRARY, own)
    libraries, symbols = missing_from_here(loaded, torch.values(), [*own, *torch])
    build_stubs(symbols, libraries, folder)
    return symbols


def _load(facts: WheelFacts, library: Path, stubs: Path) -> dict[str, Any]:
    """What `child.py` wrote down. The process is bounded in memory and time, and inherits no settings of this one."""
    answer = library.parent / "answer.json"
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(stubs), os.environ.get("LD_LIBRARY_PATH", "")])),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
        "HOME": str(stubs),
    }
    with resources.as_file(resources.files("isthmus.chips.wheel") / "child.py") as program:
        command = [sys.executable, "-P", str(program), str(library), str(answer), str(MEMORY_BYTES), str(SECONDS)]
        try:
            done = subprocess.run(
                command, env=environment, cwd=stubs, capture_output=True, text=True, timeout=WALL_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise IsthmusError(f"{facts.file} did not load within {WALL_SECONDS} s") from None
    if done.returncode or not answer.is_file():
        raise IsthmusError(f"{facts.file} cannot be loaded beside torch {facts.torch}: {_why(done)}")
    return json.loads(answer.read_text(encoding="utf-8"))


def _why(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"its process was ended by {signal.Signals(-done.returncode).name}"
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return lines[-1] if lines else f"its process ended with {done.returncode} and wrote nothing"


def registrations(
    facts: WheelFacts, answer: dict[str, Any], looked_up: frozenset[str], stubbed: frozenset[str]
) -> Registrations:
    """What the dispatcher said, classified.

    native: a kernel of the wheel; also an operator that it defines, and one that it differentiates itself.
    generic: torch's code for any device, made of other operators. decomposes: the same, above autograd.
    An operator that torch computes through its overload that writes into given tensors has the status of that one.
    fallback: only the wheel's fallback for all operators takes it, and it has a kernel on the CPU to run; none: it has
    not, or the wheel has no such fallback.
    """
    rows = {row["name"]: row for row in answer["operators"]}
    differentiates = frozenset(answer["kernels"]["autograd"])
    operators = {}
    for name, row in rows.items():
        custom = not row["known"]
        if (custom and row["schema"] is None) or (not custom and not name.startswith("aten::")):
            continue
        via = row["via"] if row["how"] == "default backend kernel" and row["via"] in rows else None
        own = _status(row, differentiates)
        status = _status(rows[via], differentiates) if via and own == "generic" else own
        decided = via if status != own else None
        operators[name] = Registered(name, status, decided, row["at"], custom, row["schema"])
    return Registrations(
        version=facts.version,
        torch=answer["torch"],
        file=facts.file,
        operators=operators,
        kernels=frozenset(answer["kernels"]["native"]),
        autograd=differentiates,
        autocast=frozenset(answer["kernels"]["autocast"]),
        looked_up=looked_up,
        stubbed=stubbed,
    )


def _status(row: dict[str, Any], differentiates: frozenset[str]) -> Status:
    how = row["how"]
    if how == "kernel" or (not row["known"] and how in ("math kernel", "default backend kernel")):
        return "native"
    if how == "default backend kernel":
        return "native" if row["name"] in differentiates else "generic"
    if how == "math kernel":
        return "decomposes"
    return "fallback" if how == "backend fallback" and row["cpu"] and not row["falls_through"] else "none"
