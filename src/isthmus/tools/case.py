"""Case: a failing probe as a small script that needs torch alone, for the engineers of a chip's vendor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from pydantic import ValidationError
from rich.markup import escape

from isthmus.chips import Vendor, get_chip, vendor_of
from isthmus.chips.rehearse.faults import parse_fault
from isthmus.errors import IsthmusError
from isthmus.launch.crew import Called, Crew
from isthmus.probes.cases.packing import Packing, pack, script_of, source_of, warnings_of
from isthmus.probes.cases.reproduction import HEALTHY, REPRODUCED, manner_of
from isthmus.probes.cases.shrink import RUNS, Budget, Call, Frequency, Judge, Manner, manner_of_call, shrink
from isthmus.probes.cases.surroundings import describe_machine, without_private
from isthmus.progress import Watch
from isthmus.records import FailureCase

FAILURE = "failure.json"
PROBES = "isthmus.probes.portable."
PLACES = ("", "*/", "failures/*/", "*/failures/*/", "qualify/*/failures/*/")
MOST_CALLS = 2000
CALL_S = 60.0
STALL_S = 20.0
HANG_S = 6.0
"""After how long without a sign of life a smaller call counts as hung; what is packed is confirmed with `STALL_S`."""
SHARE_OF_FIRST, SHARE_OF_STEPS = 0.25, 0.6
"""Of the seconds: what finding out how often it fails may take, and shrinking. The rest confirms what came out."""
LAST_LINES = 60


@dataclass(frozen=True)
class Packed:
    """What was written, and what it is worth. `exit_code` is that of the packed script here; None if it was not run."""

    folder: Path
    archive: Path
    call: Call
    frequency: Frequency | None
    exit_code: int | None


def execute(
    failure: Path,
    watch: Watch,
    *,
    out: Path | None = None,
    seconds: float = 120.0,
    no_shrink: bool = False,
    ranks: int | None = None,
) -> Packed:
    """Run a kept failure here, make it small, and pack it. Raises IsthmusError if there is none, or several.

    One that does not fail here is packed as it was found, and says so.
    """
    folder, case = read_case(failure)
    source_of(case.function)
    watch.say(f"  {escape(case.title)}: {escape(case.observed)}")
    for warning in warnings_of(case):
        watch.say(f"  [yellow]{escape(warning)}[/]")
    vendor = vendor_of(case.chip)
    with Bench(case, folder, vendor) as bench:
        study = Study(case, bench, watch, seconds)
        study.look(ranks)
        if study.fails_here and not no_shrink:
            study.shrink()
        elif no_shrink:
            study.story.append("Packed as it was found, as asked.")
        study.compare()
    return _write(study, folder, vendor, out or folder / f"reproduce-{folder.name}")


def read_case(path: Path) -> tuple[Path, FailureCase]:
    """The one failure of a folder: of a case, of a pool, of `qualify/`, or of a run.

    Raises IsthmusError if there is none or several, and for a damaged one: which file it is, what is wrong with it, and
    what to do.
    """
    if path.name == FAILURE:
        path = path.parent
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise IsthmusError(f"{path} {what}. Name the folder of a failure, or a run folder: isthmus case RUN")
    found = sorted({file for place in PLACES for file in path.glob(f"{place}{FAILURE}")})
    if not found:
        raise IsthmusError(
            f"{path} holds no {FAILURE}: `isthmus qualify` keeps one for each probe that fails. To look into a model "
            f"bundle, use: isthmus inspect {path}"
        )
    if len(found) > 1:
        lines = "\n".join(f"  isthmus case {file.parent}    # {_title(file)}" for file in found)
        raise IsthmusError(f"{path} holds {len(found)} failures. Say which:\n{lines}")
    case = _load(found[0])
    for name in case.files:
        _check_file(found[0], name, case.arguments.get(name))
    return found[0].parent, case


def _title(file: Path) -> str:
    try:
        return _load(file).title
    except IsthmusError as error:
        return str(error).splitlines()[0]


def _load(file: Path) -> FailureCase:
    try:
        case = FailureCase.model_validate_json(file.read_bytes())
    except OSError as error:
        raise _damaged(file, f"it cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise _damaged(file, _what_is_wrong(error)) from None
    if not case.function.startswith(PROBES):
        raise IsthmusError(f"{file} names the function {case.function}; only those of {PROBES}* can be packed.")
    lacking = [key for reply in case.replies for key in ("rank", "state", "value", "error") if key not in reply]
    if lacking:
        raise _damaged(file, f"a reply lacks `{lacking[0]}`")
    if case.ranks < 1:
        raise _damaged(file, f"`ranks` is {case.ranks}, and a call needs one at least")
    try:
        get_chip(case.chip)
        for fault in case.planted:
            parse_fault(fault)
    except IsthmusError as error:
        raise _damaged(file, str(error)) from None
    return case


def _check_file(file: Path, argument: str, name: object) -> None:
    """Raise IsthmusError unless an argument of a case names a file of tensors beside it."""
    if not isinstance(name, str) or Path(name).name != name:
        raise _damaged(file, f"the argument `{argument}` must name a file beside it, not {name!r}")
    beside = file.parent / name
    if not beside.is_file():
        raise _damaged(beside, f"it is not there, and holds what the call in {file.name} was given")
    if not _holds_tensors(beside):
        raise _damaged(beside, f"torch cannot read it as the tensors that the call in {file.name} was given")


def _holds_tensors(file: Path) -> bool:
    """Whether a file is whole, by the checksums in it, and one that torch saved. Nothing in it is loaded."""
    try:
        with zipfile.ZipFile(file) as archive:
            saved = any(name.endswith("/data.pkl") for name in archive.namelist())
            return saved and archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError):
        return False


def _damaged(file: Path, what: str) -> IsthmusError:
    return IsthmusError(
        f"{file}: {what}\nThe failure was not kept whole, or was changed since. Copy its folder again from where it "
        "was found, or find it anew: isthmus qualify RUN --again"
    )


_MUST_BE = {"int": "a whole number", "string": "a text", "bool": "true or false", "list": "a list", "dict": "an object"}


def _what_is_wrong(error: ValidationError) -> str:
    """The first thing that is wrong with a kept failure, in a line, and how many more there are."""
    problems = error.errors(include_url=False)
    first, more = problems[0], len(problems) - 1
    where, kind = ".".join(map(str, first["loc"])), first["type"]
    expected = _MUST_BE.get(kind.partition("_")[0], "something else")
    if kind == "json_invalid":
        what = f"it is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
    elif kind == "model_type":
        what = "it is JSON, and no object"
    elif kind == "missing":
        what = f"it lacks `{where}`"
    elif kind == "extra_forbidden":
        what = f"it has `{where}`, which no kept failure has"
    else:
        given = repr(first["input"])
        what = f"`{where}` must be {expected}, not {given if len(given) <= 60 else f'{given[:57]}...'}"
    return what + (f" (and {more} more such)" if more else "")


@dataclass
class Bench:
    """Where a case is run: `here`, as it was found, and `plain`, on the CPU without rules and faults."""

    case: FailureCase
    folder: Path
    vendor: Vendor
    patience: float = STALL_S
    _crews: dict[str, Crew] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for crew in self._crews.values():
            crew.stop()

    @property
    def device(self) -> str:
        return self.case.device

    @property
    def is_here(self) -> bool:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return self.device == "cpu" or (accelerator is not None and accelerator.type == self.device)

    @property
    def has_reference(self) -> bool:
        return self.device != "cpu" or self.case.rehearsed or bool(self.case.planted)

    def here(self, call: Call) -> Called:
        faults = tuple(parse_fault(text) for text in self.case.planted)
        chip = self.case.chip if self.case.rehearsed else None
        return self._call("here", call, Crew(call.ranks, device=self.device, chip=chip, faults=faults))

    def plain(self, call: Call) -> Called:
        return self._call("plain", call, Crew(call.ranks))

    def _call(self, kind: str, call: Call, fresh: Crew) -> Called:
        crew = self._crews.get(kind)
        if crew is None or crew.world != call.ranks:
            if crew is not None:
                crew.stop()
            crew = self._crews[kind] = fresh
        files = {name: str(self.folder / self.case.arguments[name]) for name in self.case.files}
        return crew.call(
            self.case.function,
            {**call.arguments, **files},
            deadline_s=max(CALL_S, self.patience),
            stall_s=self.patience,
        )


class Study:
    """One failure as it is run here, shrunk and compared, and the story of that in sentences."""

    def __init__(self, case: FailureCase, bench: Bench, watch: Watch, seconds: float):
        self.case, self.bench, self.watch, self.seconds = case, bench, watch, seconds
        self.first = self.call = Call(case.arguments, case.ranks)
        self.manner: Manner | None = manner_of(case.replies)
        self.frequency: Frequency | None = None
        self.values: list[object] | None = None
        self.story = [f"Found on {case.ranks} rank{'s' * (case.ranks > 1)}: {case.observed}"]

    @property
    def fails_here(self) -> bool:
        return self.frequency is not None and self.frequency.failures > 0

    def look(self, ranks: int | None) -> None:
        """Find out whether the case fails here, and how often. `ranks` None: on as many as it was found on."""
        if not self.bench.is_here:
            self.tell(f"Not run and not shrunk: this machine has no device of type {self.bench.device}.")
            return
        if self.manner is None:
            self.tell("Not shrunk: the probe does not say whether an answer is wrong, so nothing could be judged.")
            return
        first = replace(self.first, ranks=ranks or self.first.ranks)
        budget = Budget(self.seconds * SHARE_OF_FIRST, MOST_CALLS)
        began = time.monotonic()
        judge = Judge(self.bench.here, self.manner, budget)
        frequency = judge.frequency(first, runs=1)
        runs = min(RUNS, int(budget.seconds / max(time.monotonic() - began, 1e-3))) - 1
        if runs > 0:
            frequency += judge.frequency(first, runs=runs, sure_after=RUNS)
        self.frequency = frequency
        if frequency.failures:
            self.call = first
            self.tell(f"Run here on {first.ranks} rank{'s' * (first.ranks > 1)}: it {frequency}.")
        else:
            other = f" It ended in another way: {'; '.join(frequency.others)}." if frequency.others else ""
            self.tell(
                f"It did not fail here in {frequency.runs} runs on {first.ranks} ranks, so it was not shrunk.{other}"
            )

    def shrink(self) -> None:
        """Make the call small, and confirm what came out."""
        assert self.manner is not None and self.frequency is not None
        reference = None
        if self.bench.has_reference:
            reference = self.bench.plain if manner_of_call(self.bench.plain(self.call)) is None else None
        budget = Budget(self.seconds * SHARE_OF_STEPS, MOST_CALLS)
        kept = [self.call]
        with self.watch.count("shrink", max(1, int(budget.seconds))) as counter:

            def tell() -> None:
                now = kept[-1]
                done = min(int(budget.elapsed), counter.total - 1)
                counter.advance_to(done, f"{budget.spent} calls, {now.ranks} ranks, {len(now.key)} characters")

            judge = Judge(self.bench.here, self.manner, budget, reference, self.frequency.share, tell)
            self.bench.patience = HANG_S if self.manner["state"] == "hung" else STALL_S

            def fails(call: Call) -> bool:
                if not judge.fails(call):
                    return False
                kept.append(call)
                return True

            shrink(self.call, fails, _suspects(self.case))
            counter.advance_to(counter.total, f"{budget.spent} calls")
        ended = "until nothing could be made smaller" if not budget.is_over else "until the time was over"
        self.story.append(
            f"Shrunk with {budget.spent} calls in {budget.elapsed:.0f} s, {ended}; a step was kept if the call still "
            "failed in the same manner" + (", and passed on the CPU as the first one did." if reference else ".")
        )
        self._confirm(kept)

    def _confirm(self, kept: list[Call]) -> None:
        """Go back over what was kept until something fails as often as is due."""
        assert self.manner is not None and self.frequency is not None
        self.bench.patience = STALL_S
        judge = Judge(self.bench.here, self.manner, Budget(self.seconds * (1 - SHARE_OF_FIRST - SHARE_OF_STEPS), RUNS))
        usual = self.frequency.share
        index, back = len(kept) - 1, 1
        while index > 0 and (index == len(kept) - 1 or judge.budget.elapsed < judge.budget.seconds):
            call = kept[index]
            judge.budget.spent = 0
            frequency = judge.frequency(call, runs=RUNS, sure_after=RUNS)
            if frequency.failures and frequency.share >= usual / 2:
                self.call, self.frequency = call, frequency
                self.tell(f"Confirmed: on {call.ranks} rank{'s' * (call.ranks > 1)} it {frequency}.")
                return
            index, back = index - back, 2 * back
        self.tell("Nothing smaller fails as often, so it is packed as it was found.")

    def compare(self) -> None:
        """What the same call gives on the CPU without rules and faults, if it was found elsewhere."""
        if not self.bench.has_reference:
            return
        called = self.bench.plain(self.call)
        if manner_of_call(called) is None:
            self.values = called.values
            self.tell(f"The same call passes on the CPU{' without the rehearsal' * self.case.rehearsed}.")
        else:
            self.tell("The same call fails on the CPU too.")

    def tell(self, line: str) -> None:
        self.story.append(line)
        self.watch.say(f"  {escape(line)}")


def _suspects(case: FailureCase) -> list[int]:
    """The ranks at fault, as far as the replies tell: crashed, raised or wrong."""
    for state in ("crashed", "raised"):
        if ranks := [reply["rank"] for reply in case.replies if reply["state"] == state]:
            return ranks
    return [
        reply["rank"] for reply in case.replies if isinstance(reply["value"], dict) and reply["value"].get("failed")
    ]


def _write(study: Study, folder: Path, vendor: Vendor, out: Path) -> Packed:
    case = study.case
    if out.exists() and not (out / "reproduce.py").is_file():
        raise IsthmusError(f"{out} is there, and is not a packed failure. Name another folder with --out.")
    on_the_chip = case.device == vendor.device
    packing = Packing(
        case=case,
        folder=folder,
        first=study.first,
        call=study.call,
        manner=study.manner,
        frequency=study.frequency,
        story=study.story,
        doubts=[],
        values=study.values,
        extension=vendor.package if on_the_chip else None,
        backend=_backend(case),
        variables=vendor.environment if on_the_chip else {},
        environment=describe_machine(case.device, vendor),
        log="",
    )
    exit_code, printed = _try(packing, study) if study.bench.is_here else (None, "")
    log = without_private(
        "\n".join([*(f"{k}: {v}" for k, v in case.environment.items()), "", *case.log, "", printed]), os.environ
    )
    doubts = _doubts(study, exit_code)
    for doubt in doubts:
        study.watch.say(f"  [yellow]{escape(doubt)}[/]")
    archive = pack(replace(packing, doubts=doubts, log=log.strip() + "\n"), out)
    study.watch.say(f"  [bold]packed[/] {escape(str(archive))}")
    return Packed(out, archive, study.call, study.frequency, exit_code)


def _doubts(study: Study, exit_code: int | None) -> list[str]:
    """What takes from the worth of the packed script, beside a rehearsal."""
    if study.case.rehearsed or study.case.planted:
        return []
    if study.fails_here and exit_code not in (None, REPRODUCED):
        return [
            f"The script alone ended with exit code {exit_code} where Isthmus' own ranks fail: it needs more to fail."
        ]
    if study.frequency is not None and not study.fails_here and exit_code != REPRODUCED:
        return ["It did not fail again when it was packed. It is as it was found, and not shrunk."]
    return []


def _try(packing: Packing, study: Study) -> tuple[int | None, str]:
    """Run the packed script as the vendor's engineer will. Returns its exit code and what it printed."""
    with tempfile.TemporaryDirectory(prefix="isthmus-case-") as temporary:
        script = Path(temporary, "reproduce.py")
        script.write_text(script_of(packing), encoding="utf-8")
        for name in packing.case.files:
            Path(temporary, packing.case.arguments[name]).write_bytes(
                (packing.folder / packing.case.arguments[name]).read_bytes()
            )
        command = [sys.executable, str(script), "--stall", str(2 * STALL_S)]
        running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            out, err = running.communicate(timeout=2 * CALL_S)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # its ranks too
            running.communicate()
            study.tell(f"The packed script was run here and had not ended after {2 * CALL_S:.0f} s.")
            return None, ""
    meaning = {HEALTHY: "it passes here", REPRODUCED: "it fails here"}.get(running.returncode, "it could not tell")
    study.tell(f"The packed script was run here: exit code {running.returncode}, {meaning}.")
    printed = "\n".join([*out.splitlines(), *err.splitlines()[-LAST_LINES:]])
    return running.returncode, f"what the packed script printed here:\n{printed}"


def _backend(case: FailureCase) -> str:
    if case.device == "cpu":
        return "gloo"
    named = get_chip(case.chip).collectives
    return named[0] if named else dist.Backend.default_device_backend_map.get(case.device, "gloo")
