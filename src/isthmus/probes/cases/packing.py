"""A failing call as a folder for the vendor's engineers: one script that needs torch alone, and what they ask first."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import io
import json
import math
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.probes.cases.shrink import Call, Frequency, Manner
from isthmus.records import FailureCase
from isthmus.run import new_folder, write_atomic

MARK = "# --- packed from here on ---\n"
SCRIPT, README, EXPECTED, ENVIRONMENT, LOG = "reproduce.py", "README.md", "expected.json", "environment.txt", "log.txt"
FUTURE = "from __future__ import annotations\n"
PRELUDE = """import os
import sys


def _could_not_run(kind, error, trace):
    sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    os._exit(2)


sys.excepthook = _could_not_run
"""
"""What makes an error of this script itself, a torch that is not there for example, end with 2 and not with 1."""
LINE = 110
MOST_RUNS = 50
SEEN = 0.95
"""Probability with which the script sees a failure that comes and goes, at the frequency seen here."""


@dataclass(frozen=True)
class Packing:
    """All that goes into a packed failure. `call` is what fails, `first` what was found; `manner` how it fails.

    `frequency` None: it was not run here. `story` says in sentences what was tried, `doubts` what its reader must know
    first. `values` are the answers of a place where the same call passes, per rank. `extension`, `backend` and
    `variables` are what torch needs for the device.
    """

    case: FailureCase
    folder: Path
    first: Call
    call: Call
    manner: Manner | None
    frequency: Frequency | None
    story: list[str]
    doubts: list[str]
    values: list[Any] | None
    extension: str | None
    backend: str
    variables: dict[str, str]
    environment: str
    log: str


def source_of(function: str) -> str:
    """The source of the file that holds a portable function. Raises IsthmusError if it needs more than torch."""
    module, _, name = function.partition(":")
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of what stands before the last dot
        found = None
    if found is None or not found.origin or not Path(found.origin).is_file():
        raise IsthmusError(
            f"{module} is not here: this version of Isthmus has no such probe. Use the one that found it."
        )
    source = Path(found.origin).read_text(encoding="utf-8")
    names = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    if name not in names:
        raise IsthmusError(f"{module} has no function {name!r}: use the version of Isthmus that found the failure.")
    if foreign := foreign_imports(source):
        raise IsthmusError(
            f"{module} cannot be packed: it imports {', '.join(foreign)}, and a script may need only torch."
        )
    return source


def foreign_imports(source: str) -> list[str]:
    """The modules that a file imports beside torch and the standard library, relative imports included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return sorted(one for one in found if one.partition(".")[0] not in {"torch", *sys.stdlib_module_names})


def clashing_names(source: str) -> list[str]:
    """Names that a portable file and the runner behind it both define, and not as the same import."""
    runner, probe = _top_level(runner_source()), _top_level(source)
    return sorted(name for name in runner.keys() & probe.keys() if runner[name] != probe[name] or not runner[name])


def _top_level(source: str) -> dict[str, str]:
    """Names that a module defines; for an import where it comes from, else an empty text."""
    names: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else "import"
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = ""
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                names |= {one.id: "" for one in ast.walk(target) if isinstance(one, ast.Name)}
    return names


def runner_source() -> str:
    """The part of the script that is the same for all probes."""
    found = importlib.util.find_spec("isthmus.probes.cases.reproduction")
    assert found is not None and found.origin is not None
    return Path(found.origin).read_text(encoding="utf-8").partition(MARK)[2]


def runs_needed(frequency: Frequency | None) -> int:
    """Runs after which a failure of this frequency was seen with probability `SEEN`: log(1 - s) / log(1 - f)."""
    if frequency is None or frequency.failures in (0, frequency.runs):
        return 3
    return min(MOST_RUNS, max(3, math.ceil(math.log(1 - SEEN) / math.log(1 - frequency.share))))


def script_of(packing: Packing) -> str:
    """`reproduce.py`: the probe's file unchanged, the runner, and the case."""
    source = source_of(packing.case.function)
    if clashes := clashing_names(source):
        raise IsthmusError(f"{packing.case.function} cannot be packed: its file and the runner both define {clashes}.")
    case = {
        "title": packing.case.title,
        "arguments": packing.call.arguments,
        "files": packing.case.files,
        "ranks": packing.call.ranks,
        "device": packing.case.device,
        "extension": packing.extension,
        "backend": packing.backend,
        "runs": runs_needed(packing.frequency),
        "manner": packing.manner,
        "expected": packing.case.expected,
        "observed": packing.case.observed,
        "warnings": warnings_of(packing.case),
    }
    name = packing.case.function.partition(":")[2]
    tail = (
        f'CASE = json.loads(r"""\n{json.dumps(case, indent=1)}\n""")\n\n'
        f'if __name__ == "__main__":\n    sys.exit(reproduce(CASE, {name}, __file__))\n'
    )
    variables = "".join(f"os.environ.setdefault({n!r}, {value!r})\n" for n, value in packing.variables.items())
    parts = [
        f"#!/usr/bin/env python3\n{FUTURE}\n{PRELUDE}{variables}",
        f"# The probe, as it is in Isthmus.\n{source.replace(FUTURE, '', 1).strip()}\n",
        f"# What runs it, and tells what comes.\n{runner_source().strip()}\n",
        f"# The case.\n{tail}",
    ]
    return "\n\n".join(parts)


def warnings_of(case: FailureCase) -> list[str]:
    """What has to be said first where the failure does not come from the vendor's chip."""
    if case.planted:
        return [
            f"REHEARSAL: the fault was planted ({'; '.join(case.planted)}) on the CPU. This script does not contain "
            "it, so on a healthy machine it passes. It says nothing about any vendor's chip."
        ]
    if case.rehearsed:
        return [
            f"REHEARSAL: the rules of {case.chip} were enforced on the CPU. This script does not contain them, so on a "
            "healthy machine it passes. It says nothing about any vendor's chip."
        ]
    return []


def pack(packing: Packing, out: Path) -> Path:
    """Write the folder and, beside it, the same as NAME.tar.gz. Returns the archive. Equal content, equal bytes."""
    with new_folder(out) as folder:
        for name, text in texts_of(packing).items():
            (folder / name).write_text(text, encoding="utf-8")
        for argument in packing.case.files:
            shutil.copyfile(
                packing.folder / packing.call.arguments[argument], folder / packing.call.arguments[argument]
            )
        (folder / SCRIPT).chmod(0o755)
    return write_archive(out)


def write_archive(folder: Path) -> Path:
    """FOLDER.tar.gz, with nothing in it that depends on when, where or by whom it was made."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for path in sorted(one for one in folder.iterdir() if one.is_file()):
            entry = tarfile.TarInfo(f"{folder.name}/{path.name}")
            entry.size, entry.mode = path.stat().st_size, 0o755 if path.name == SCRIPT else 0o644
            with path.open("rb") as file:
                archive.addfile(entry, file)
    target = folder.with_name(f"{folder.name}.tar.gz")
    write_atomic(target, packed.getvalue())
    return target


def texts_of(packing: Packing) -> dict[str, str]:
    """Every text file by name."""
    expected = {
        "expected": packing.case.expected,
        "observed": packing.case.observed,
        "manner": packing.manner,
        "fails": None if packing.frequency is None else vars(packing.frequency),
        "arguments": packing.call.arguments,
        "ranks": packing.call.ranks,
        "values_where_it_passes": packing.values,
        "replies_when_it_was_found": packing.case.replies,
    }
    return {
        SCRIPT: script_of(packing),
        README: readme_of(packing),
        EXPECTED: json.dumps(expected, indent=1, default=str) + "\n",
        ENVIRONMENT: packing.environment,
        LOG: packing.log,
    }


def readme_of(packing: Packing) -> str:
    """What fails, how to run it, and how it came to be what it is, for somebody who knows the chip and not Isthmus."""
    case, call, first = packing.case, packing.call, packing.first
    needs = f"torch and {packing.extension}" if packing.extension else "torch"
    warning = "".join(f"> **{one}**\n\n" for one in (*warnings_of(case), *packing.doubts))
    how_often = "It was not run where it was packed." if packing.frequency is None else f"It {packing.frequency}."
    story = "\n".join(f"- {line}" for line in packing.story)
    files = "".join(
        f"| `{call.arguments[name]}` | inputs: a dict of tensors for `torch.load` |\n" for name in case.files
    )
    return f"""{warning}# {case.title}

Expected: {case.expected}

Observed: {case.observed}

{how_often} It shows as {_said(packing.manner)}. Probe: {case.probe}, on {call.ranks} rank{"s" * (call.ranks > 1)} of \
{case.device} (pool {case.pool}, chip {case.chip}).

## How to run it

    python {SCRIPT}
    torchrun --nproc-per-node {call.ranks} {SCRIPT}

The first starts its own ranks; the second, started on each of several machines, takes the ranks from torchrun.
It needs {needs} and nothing else. Exit code 0: healthy; 1: the failure showed; 2: it could not run, or something else
went wrong. `--device cpu` runs the same on the CPU, `--runs` more often, `--help` lists the rest. The call is at the
end of the script, as JSON; the function that it calls is at its beginning.

## What is here

| File | Content |
|---|---|
| `{SCRIPT}` | the failing call |
| `{EXPECTED}` | what was expected and what came, rank by rank |
| `{ENVIRONMENT}` | versions, devices and variables of the machine where this was packed |
| `{LOG}` | the end of what the ranks printed when it was found, and the versions there |
{files}
Inputs are made from a seed by the function itself, unless a file of inputs is listed. Paths outside the system's
folders, names of hosts and users, and variables that look like secrets were left out.

## How it became this small

{story}

| | Found | Packed |
|---|---|---|
| ranks | {first.ranks} | {call.ranks} |
{_changes(first.arguments, call.arguments)}
"""


def _said(manner: Manner | None) -> str:
    said = {"wrong": "a wrong answer", "raised": "an error", "crashed": "a crash", "hung": "a hang"}
    if manner is None:
        return "a figure that the probe itself does not judge"
    return said[manner["state"]] + (f" ({'; '.join(manner['errors'])})" if manner["errors"] else "")


def _changes(first: dict[str, Any], now: dict[str, Any]) -> str:
    rows = [(name, json.dumps(first.get(name)), json.dumps(value)) for name, value in now.items()]
    return "\n".join(f"| `{name}` | `{_short(before)}` | `{_short(after)}` |" for name, before, after in rows)


def _short(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if len(text) <= LINE else f"{text[: LINE - 4]} ..."
