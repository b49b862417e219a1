"""Collect: what stages left in copies of a run folder, brought into the run with every hash looked at.

A stage runs where its pool is, in a copy of the run folder. Such a copy is believed if it is of the same recipe, if its
chain of events is whole, and if every file is the one whose hash its list has. All copies are judged before anything is
written, and what lies in the run already is never replaced by something else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from isthmus.chain import EVENTS, FILES, Entry
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.files.bundle import SEAL
from isthmus.lines import parse_object
from isthmus.lock import writing_run
from isthmus.parity.seal import verify_seal
from isthmus.pools import placed_pools
from isthmus.progress import Watch
from isthmus.records import STEP_RECORDS, HandoffRecord, PlanRecord, QualifyRecord, WeightsRecord
from isthmus.run import Record, RunFolder, difference, new_folder
from isthmus.trainer.checkpoint_files import MANIFEST, read_manifest, verify_file

NAME = "collect"
EVIDENCE = "collected"
BEGAN = "recipe.json"


@dataclass(frozen=True)
class Unit:
    """What one act leaves: its record, by its name without `.json`, and the folders of its files."""

    title: str
    stage: str
    record: str
    kind: type[Record]
    folders: tuple[str, ...]
    pool: str | None = None

    @property
    def file(self) -> str:
        return f"{self.record}.json"

    def has(self, name: str) -> bool:
        return name == self.file or self.has_within(name)

    def has_within(self, name: str) -> bool:
        return any(name.startswith(f"{folder}/") for folder in self.folders)

    def tells(self, event: Mapping[str, Any]) -> bool:
        """Whether an event is of this act."""
        if event.get("stage") != self.stage:
            return False
        about = event.get("pool") or event.get("what")
        return self.pool is None or about is None or self.pool in str(about).replace("(", " ").split()


@dataclass(frozen=True)
class Weights:
    """A folder with hashes of its own, which the record vouches for: a checkpoint, or a sealed bundle."""

    name: str
    sha256: str | None = None
    seal_id: str | None = None

    def check(self, root: Path) -> list[str]:
        """The files in the folder below `root` that the record vouches for.

        Raises GateRefused that names what is not as the record says, and links.
        """
        folder = root / self.name
        _refuse_links(root, self.name)
        if self.sha256 is None:
            return [SEAL, *verify_seal(folder, self.seal_id).files]
        manifest = read_manifest(folder, self.sha256)[0]
        for file in manifest.files:
            verify_file(folder, manifest, file)
        return [MANIFEST, *manifest.files]


def weights_of(record: Record) -> list[Weights]:
    """The folders whose hashes are not on the list of files, but in this record, or in seals."""
    if isinstance(record, WeightsRecord):
        return [Weights(record.checkpoint, sha256=record.checkpoint_sha256)]
    if isinstance(record, HandoffRecord) and record.verdict == "pass":
        ids = {record.format: record.seal_id}
        return [Weights(folder, seal_id=ids.get(name)) for name, folder in record.bundles.items()]
    return []


@dataclass
class Find:
    """What a copy has of a unit: files that the run lacks, in `new`, and where the record is among them its `weights`.
    `replaces`: the run's own is no result, and this one is. `left`: why nothing is taken. `what`: why all is refused.
    The files of weights are by their folders."""

    copy: RunFolder
    unit: Unit
    new: dict[str, Entry] = field(default_factory=dict)
    weights: dict[Weights, list[str]] = field(default_factory=dict)
    replaces: bool = False
    left: str = ""
    what: str = ""


def execute(folders: Sequence[Path], run: RunFolder, watch: Watch) -> list[Find]:
    """Bring what the copies in `folders` have, and say what that was. The caller holds the lock of `run`.

    Raises IsthmusError for a copy of another recipe, for a record that is there with other content, and DamagedFile for
    files that were touched; nothing is then written.
    """
    with contextlib.ExitStack() as locks:
        copies = [locks.enter_context(_quiet(folder, run)) for folder in folders]
        found = [find for copy in copies for find in _look(copy, run)]
        _agree(found)
        for copy in copies:
            news = [find for find in found if find.copy is copy and find.new]
            if news:
                _bring(copy, news, run, watch)
    watch.console.print(_table(found))
    if not found:
        raise IsthmusError(
            f"{', '.join(map(str, folders))}: no act is done there. Run one first, such as: isthmus qualify FOLDER "
            f"--pool {placed_pools(run.recipe)[0].name}"
        )
    return found


def meant_for(folder: Path) -> Path:
    """The run folder that a copy belongs to where none is named: runs/<recipe name>."""
    return Path("runs") / RunFolder.open(folder).recipe.name


@contextlib.contextmanager
def _quiet(folder: Path, run: RunFolder) -> Iterator[RunFolder]:
    """A copy of the run in which nobody writes, once its recipe and its hashes were looked at."""
    copy = RunFolder.open(folder)
    if folder.resolve() == run.path.resolve():
        raise IsthmusError(f"{folder} is the run itself; name a copy of it in which an act was run elsewhere")
    if copy.recipe.digest() != run.recipe.digest():
        raise IsthmusError(
            f"{folder} is of another recipe than {run.path} ({difference(run.recipe, copy.recipe)}): what was found "
            f"there says nothing about this run. Start from a copy of {run.path / BEGAN}"
        )
    with writing_run(folder) if os.access(folder, os.W_OK) else contextlib.nullcontext():
        _check(copy)
        yield copy


def _check(copy: RunFolder) -> None:
    """Raise DamagedFile unless the chain of events is whole, and each file of the list that is there is as it was."""
    for name in (FILES, EVENTS):
        if not (copy.path / name).is_file():
            raise DamagedFile(f"{copy.path} has no {name}, and so nothing vouches for it. Copy the whole folder again.")
    touched = [one for one in copy.breaks() if not one.missing]
    if touched:
        more = f" (and {len(touched) - 1} more, which `isthmus inspect {copy.path}` names)" if touched[1:] else ""
        raise DamagedFile(
            f"{copy.path / touched[0].file} {touched[0].what}{more}: it was touched, or did not arrive whole. "
            "Copy the folder again from where it was made; nothing was taken."
        )
    for name in copy.entries:
        if not _is_plain(name):
            raise DamagedFile(
                f"{copy.path / FILES} lists {name!r}, which may lead out of the folder: no run wrote that. Copy the "
                "folder again from where it was made; nothing was taken."
            )


def _is_plain(name: str) -> bool:
    """Whether a name relative to a folder stays in it, and is the only way to write that place."""
    return not any(part in ("", ".", "..") for part in name.split("/"))


def _refuse_links(root: Path, name: str) -> None:
    """Raise DamagedFile if there is a link on the way from `root` to `name`, or below it."""
    path, depth = root / name, name.count("/") + 1
    for one in [*reversed([path, *path.parents][:depth]), *sorted(path.rglob("*"))]:
        if one.is_symlink():
            raise DamagedFile(
                f"{one} is a link, and what it leads to is not taken. Where it is meant, copy the folder with "
                "cp -rL, which puts files in the place of links; nothing was taken."
            )


def _units(run: RunFolder) -> list[Unit]:
    """What the acts of a run leave, in its order; the plan stands last, as it is taken with what rests on it alone."""
    pools = [pool.name for pool in placed_pools(run.recipe)]
    qualified = [
        Unit(f"qualify {name}", "qualify", f"qualify/{name}", QualifyRecord, (f"qualify/{name}",), name)
        for name in pools
    ]
    steps = [
        Unit(step.name, step.name, f"steps/{step.name}/record", STEP_RECORDS[step.kind], (f"steps/{step.name}",))
        for step in run.recipe.step
    ]
    handoff = Unit("handoff", "handoff", "parity", HandoffRecord, ("bundle",))
    return [*qualified, *steps, handoff, Unit("plan", "plan", "plan", PlanRecord, ())]


def _look(copy: RunFolder, run: RunFolder) -> list[Find]:
    """What is done in a copy, beside what the run has."""
    found = [_find(copy, unit, run) for unit in _units(run) if unit.file in copy.entries]
    rests_on_plan = any(find.new and find.unit.stage not in ("qualify", "plan") for find in found)
    found = [find for find in found if rests_on_plan or find.unit.stage != "plan"]
    for find in found:
        if find.what:
            raise IsthmusError(find.what)
    return found


def _find(copy: RunFolder, unit: Unit, run: RunFolder) -> Find:
    record = copy.read_record(unit.record, unit.kind)
    stray = None if record is None else _stray(copy, unit, record, run)
    if record is None or stray:
        raise DamagedFile(
            stray or f"{copy.path / unit.file} is missing, and stands on the list. Copy the folder again."
        )
    own = run.read_record(unit.record, unit.kind)
    if isinstance(record, QualifyRecord) and record.disturbed:
        return _disturbed(copy, unit, record.disturbed[0], own)
    find = Find(copy, unit)
    theirs = {name: entry for name, entry in copy.entries.items() if unit.has(name)}
    ours = {name: entry for name, entry in run.entries.items() if unit.has(name)}
    different = [name for name in theirs if name in ours and ours[name].sha256 != theirs[name].sha256]
    find.replaces = bool(different) and own is not None and not _is_result(own) and _is_result(record)
    if different and not find.replaces:
        find.what = _conflict(run.path, copy.path, unit, unit.file if unit.file in different else different[0])
    find.new = {name: entry for name, entry in theirs.items() if find.replaces or name not in ours}
    for name in find.new:
        if not (copy.path / name).is_file():
            raise DamagedFile(
                f"{copy.path / name} is missing, and {unit.file} stands on it. Copy the whole folder again."
            )
        _refuse_links(copy.path, name)
    if unit.file in find.new:
        for weights in weights_of(record):
            _refuse_elsewhere(weights, copy, unit, {**theirs, **ours})
            find.weights[weights] = weights.check(copy.path)
    return find


def _disturbed(copy: RunFolder, unit: Unit, why: str, own: Record | None) -> Find:
    """What is found of a pool whose probes were disturbed in the copy; `own` is the record of it that the run has."""
    if own is not None:
        return Find(copy, unit, left="no: probes were disturbed there; the run keeps its own")
    what = (
        f"{copy.path / unit.file}: probes were disturbed there ({why}), so it is not done; qualify again: isthmus "
        f"qualify {copy.path} --pool {unit.pool}"
    )
    return Find(copy, unit, what=what)


def _refuse_elsewhere(weights: Weights, copy: RunFolder, unit: Unit, listed: Mapping[str, Entry]) -> None:
    """Raise DamagedFile unless a folder of weights is one of this act's own, without files that are `listed`."""
    name = weights.name
    if not (_is_plain(name) and unit.has_within(name)):
        within = " or ".join(f"{folder}/" for folder in unit.folders)
        raise DamagedFile(
            f"{copy.path / unit.file} names weights in {name!r}, and those of {unit.title} lie in {within}. "
            "Copy the folder again from where it was made; nothing was taken."
        )
    if inside := [one for one in listed if one == name or one.startswith(f"{name}/")]:
        raise DamagedFile(
            f"{copy.path / unit.file} names weights in {name!r}, where {inside[0]} lies, which is none of them. "
            "Copy the folder again from where it was made; nothing was taken."
        )


def _stray(copy: RunFolder, unit: Unit, record: Record, run: RunFolder) -> str | None:
    """What is wrong with a record that matches its hash; None if nothing is."""
    digest = run.recipe.digest()
    made_from = copy.entries[unit.file].made_from.get("recipe")
    if record.recipe_sha256 != digest or made_from != digest:
        return f"{copy.path / unit.file} is a record of another recipe, laid into this folder. Nothing was taken."
    if isinstance(record, QualifyRecord) and record.pool != unit.pool:
        return f"{copy.path / unit.file} is the record of the pool {record.pool!r}, renamed. Nothing was taken."
    return None


def _is_result(record: Record) -> bool:
    """Whether a record stands, and does not say that its act is to be done again."""
    if isinstance(record, HandoffRecord):
        return record.verdict == "pass"
    return not (isinstance(record, QualifyRecord) and record.disturbed)


def _conflict(ours: Path, theirs: Path, unit: Unit, name: str) -> str:
    if unit.stage == "plan":
        return (
            f"{theirs} rests on another plan than {ours}. One of both runs has to be done again: delete "
            f"{ours / name} to take that of {theirs}, or copy the run folder anew and run the act there again."
        )
    return (
        f"{unit.title} is done twice, with different content: {ours / name} and {theirs / name}. Which of them counts "
        f"is yours to say: delete {ours / unit.file}{_and_folders(ours, unit)} to take that of {theirs}, or leave "
        "that out."
    )


def _and_folders(run: Path, unit: Unit) -> str:
    return "".join(f" and {run / folder}" for folder in unit.folders)


def _agree(found: Sequence[Find]) -> None:
    """Raise IsthmusError if two copies have different content for one file."""
    seen: dict[str, tuple[str, Find]] = {}
    for find in found:
        for name, entry in find.new.items():
            sha256, other = seen.setdefault(name, (entry.sha256, find))
            if sha256 != entry.sha256:
                raise IsthmusError(_conflict(other.copy.path, find.copy.path, find.unit, name))


def _bring(copy: RunFolder, finds: Sequence[Find], run: RunFolder, watch: Watch) -> None:
    """Files, then events, then records: what is stopped half-way has no record yet, and is brought again."""
    evidence = f"{EVIDENCE}/{copy.digest or ''}"[: len(EVIDENCE) + 13]
    files = [(find, name) for find in finds for name in find.new if name != find.unit.file]
    for find in finds:
        if find.replaces:
            _clear(run, find.unit)
    with watch.count(f"collect {copy.path.name}", len(files) + len(finds)) as counter:
        for number, (find, name) in enumerate(files):
            counter.advance_to(number, name)
            run.receive(name, copy.path / name, find.new[name])
        for weights, names in (one for find in finds for one in find.weights.items()):
            counter.advance_to(len(files), weights.name)
            _bring_weights(weights, names, copy, run)
        for name in (FILES, EVENTS):
            run.keep(run.path / evidence / name, (copy.path / name).read_bytes())
        _retell(copy, [find.unit for find in finds], run, evidence)
        taken = [find.unit.title for find in finds]
        run.event(NAME, "take", what=", ".join(taken), folder=str(copy.path), evidence=evidence)
        for find in finds:
            if find.unit.file in find.new:
                run.receive(find.unit.file, copy.path / find.unit.file, find.new[find.unit.file])
        counter.advance_to(len(files) + len(finds))


def _bring_weights(weights: Weights, names: Sequence[str], copy: RunFolder, run: RunFolder) -> None:
    """Copy their files and look at every byte again; they appear whole, or not at all."""
    there, here = copy.path / weights.name, run.path / weights.name
    here.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(here) as new:
        for name in names:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(there / name, new / name, follow_symlinks=False)
        replace(weights, name=new.name).check(new.parent)


def _clear(run: RunFolder, unit: Unit) -> None:
    paths = [run.path / unit.file, *(run.path / folder for folder in unit.folders)]
    run.forget(*paths)
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _retell(copy: RunFolder, units: Sequence[Unit], run: RunFolder, evidence: str) -> None:
    """Events of these acts that happened in the copy, at their time; each links to its line there, and is told once."""
    theirs = copy.chain
    known = set(run.chain.ends.values()) | {event.get("link") for event in run.events()}
    for body, link in zip(theirs.bodies, theirs.ends.values(), strict=False):
        event = parse_object(body)
        if link not in known and any(unit.tells(event) for unit in units):
            run.event(**{**event, "evidence": evidence, "link": link})


def _table(found: Sequence[Find]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("act", "from", "files", "taken"):
        table.add_column(title, overflow="fold", justify="right" if title == "files" else "left")
    for find in found:
        there = "done again: the run's own was no result" if find.replaces else "yes"
        taken = find.left or (there if find.new else "is there already, the same")
        table.add_row(escape(find.unit.title), escape(str(find.copy.path)), str(len(find.new)), taken)
    return table
