"""The run folder: typed records, append-only events, atomic writes, and figures that carry their kind.

Stages meet only here. A reader never sees half a record: a write goes to a temporary file, is flushed to disk and
renamed, and the folder is flushed after it. What is touched afterwards is found by its hash: events are a chain, and
files.json has the hashes of all files that stages left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from isthmus.chain import (
    EVENTS,
    FILES,
    Break,
    Chain,
    Entry,
    Head,
    Ledger,
    begin,
    is_event,
    linked,
    read_chain,
    unlinked,
)
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.lines import read_bytes, read_json
from isthmus.recipe.read import resolved_recipe
from isthmus.recipe.schema import Recipe, content_digest

Kind = Literal["measured", "declared", "forecast", "rehearsed"]
_WEAKEST_LAST: tuple[Kind, ...] = ("measured", "declared", "forecast", "rehearsed")
RecordType = TypeVar("RecordType", bound="Record")
NOTHING: Mapping[str, str] = MappingProxyType({})


class Figure(BaseModel):
    """A number with unit, kind and source. `value` None means unknown. The kind cannot be changed after the fact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float | int | None
    unit: str
    kind: Kind
    source: str = Field(min_length=1)
    low: float | None = None
    high: float | None = None

    @field_validator("value", "low", "high")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("a figure is finite or unknown (None)")
        return value

    @classmethod
    def measured(
        cls,
        value: float,
        unit: str,
        source: str,
        *,
        rehearsed: bool,
        low: float | None = None,
        high: float | None = None,
    ) -> Self:
        """A number read off this run. On a rehearsed pool its kind is `rehearsed`, never `measured`."""
        kind: Kind = "rehearsed" if rehearsed else "measured"
        return cls(value=value, unit=unit, kind=kind, source=source, low=low, high=high)

    @classmethod
    def derived(
        cls,
        value: float | None,
        unit: str,
        source: str,
        *inputs: Figure,
        low: float | None = None,
        high: float | None = None,
    ) -> Self:
        """A number computed from others: it has the weakest kind among them."""
        if not inputs:
            raise ValueError("a derived figure needs the figures it comes from")
        kinds: list[Kind] = [figure.kind for figure in inputs]
        kind = max(kinds, key=_WEAKEST_LAST.index)
        return cls(value=value, unit=unit, kind=kind, source=source, low=low, high=high)

    def model_copy(self, *, update: Any = None, deep: bool = False) -> Self:
        if update and "kind" in update:
            raise TypeError("the kind of a figure cannot be changed; make a new figure from its source")
        return type(self).model_validate({**self.model_dump(), **(update or {})})

    def copy(self, *, include: Any = None, exclude: Any = None, update: Any = None, deep: bool = False) -> Self:
        """The deprecated spelling of `model_copy`, with the same rule."""
        return self.model_copy(update=update, deep=deep)

    def __str__(self) -> str:
        if self.value is None:
            return f"unknown {self.unit}".rstrip()
        text = f"{self.value:,.4g}" if isinstance(self.value, float) else f"{self.value:,}"
        interval = f" [{self.low:,.4g}, {self.high:,.4g}]" if self.low is not None and self.high is not None else ""
        return f"{text}{interval} {self.unit} ({self.kind})".replace("  ", " ")


class Record(BaseModel):
    """Base of a stage's result. Written last, so that its presence means that the stage is done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe_sha256: str
    started: float = Field(description="Unix time, seconds")
    ended: float = Field(description="Unix time, seconds")

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def made_from(self) -> dict[str, str]:
        """Hashes of what it was made from, by name."""
        return {"recipe": self.recipe_sha256}


class RunFolder:
    """One run on disk. Open it with `create` (a recipe in hand) or `open` (an existing folder)."""

    def __init__(self, path: Path, recipe: Recipe):
        self.path = path
        self.recipe = recipe

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunFolder:
        """Make the folder, or continue one that was made from the same resolved recipe."""
        stored = path / "recipe.json"
        if stored.exists():
            existing = cls.open(path)
            if existing.recipe.digest() != recipe.digest():
                raise IsthmusError(
                    f"{path} belongs to another recipe ({difference(existing.recipe, recipe)}). "
                    "Name another folder with --run, or delete this one."
                )
            return existing
        with explain_io_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        run = cls(path, recipe)
        run.keep(stored, _json({"sha256": recipe.digest(), "recipe": json.loads(recipe.canonical())}))
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run folder; its recipe is checked against its hash.

        Keys that this version has and the one that made the folder had not have their defaults.
        """
        stored = path / "recipe.json"
        if not stored.is_file():
            raise IsthmusError(f"{path} is not a run folder: it has no recipe.json. Start one with: isthmus run RECIPE")
        content = _read_json(stored)
        if not isinstance(content, dict):
            raise DamagedFile(f"{stored} is not a stored recipe. Restore it, or start a new run folder.")
        recipe = resolved_recipe(content.get("recipe", {}), origin=stored)
        if content_digest(content.get("recipe", {})) != content.get("sha256"):
            raise DamagedFile(
                f"{stored} does not match its hash: it was edited. A changed recipe needs a new run folder."
            )
        return cls(path, recipe)

    @property
    def is_writable(self) -> bool:
        """Whether this process may tell events here."""
        return os.access(self.path, os.W_OK) and (
            not (self.path / EVENTS).exists() or os.access(self.path / EVENTS, os.W_OK)
        )

    def step_folder(self, name: str) -> Path:
        """Where a step of the recipe leaves its record, its checkpoints and what else it makes."""
        return self.path / "steps" / name

    def write_record(self, name: str, record: Record, made_from: Mapping[str, str] = NOTHING) -> None:
        """Store a record as `name`.json, atomically, with the hashes of what it was made from."""
        content = record.model_dump_json(indent=2).encode() + b"\n"
        self.keep(self.path / f"{name}.json", content, {**record.made_from, **made_from})

    def read_record(self, name: str, kind: type[RecordType]) -> RecordType | None:
        """The record `name`, or None if its stage is not done. Raises DamagedFile if it was touched."""
        path = self.path / f"{name}.json"
        if not path.exists():
            return None
        try:
            return kind.model_validate_json(self.read_kept(path, "Delete it to run its stage again"))
        except ValidationError as error:
            raise DamagedFile(
                f"{path} is not a valid {kind.__name__}: {error}. Delete it to run its stage again."
            ) from None

    def require_record(self, name: str, kind: type[RecordType], verb: str) -> RecordType:
        """The record `name`; raises IsthmusError that names the verb to run first if it is missing."""
        record = self.read_record(name, kind)
        if record is None:
            raise IsthmusError(f"{self.path / name}.json is missing; first run: isthmus {verb} {self.path}")
        return record

    def keep(self, path: Path, content: bytes, made_from: Mapping[str, str] = NOTHING) -> None:
        """Write a file of this run, atomically, and enter its hash, and those of what it was made from, by name."""
        name, entry = self._name(path), Entry(sha256=hashlib.sha256(content).hexdigest(), made_from=dict(made_from))
        with self._alone():
            self._store(self._ledger().about_to_write(name, entry))
            write_atomic(path, content)
            self._store(self._reached(self._ledger().entered(name, entry)))

    def enter(self, *paths: Path, made_from: Mapping[str, str] = NOTHING) -> None:
        """Enter files that are there, and all files in folders, unless they were entered before."""
        files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        known = self._ledger().files
        new = [file for file in files if file.is_file() and self._name(file) not in known]
        entries = {self._name(file): Entry(sha256=sha256_file(file), made_from=dict(made_from)) for file in new}
        if entries:
            with self._alone():
                ledger = self._ledger()
                self._store(self._reached(ledger.model_copy(update={"files": {**ledger.files, **entries}})))

    def note_events(self) -> None:
        """Note how far the events go now, as every record does: none of them can then be taken away unseen."""
        with self._alone():
            self._store(self._reached(self._ledger()))

    def forget(self, *paths: Path) -> None:
        """Take files, or all in folders, off the list: they are about to be deleted."""
        gone = {self._name(path) for path in paths}
        with self._alone():
            ledger = self._ledger()
            names = ledger.files.keys() | ledger.writing.keys()
            off = [name for name in names if name in gone or any(name.startswith(f"{one}/") for one in gone)]
            if off:
                self._store(ledger.without(*off))

    def read_kept(self, path: Path, advice: str) -> bytes:
        """The content of a file of this run. Raises DamagedFile, with what else to do than to restore it, if it is not
        what was written."""

        def read() -> tuple[bytes, bool]:
            ledger, content = self._ledger(), read_bytes(path, DamagedFile)
            return content, ledger.accepts(self._name(path), hashlib.sha256(content).hexdigest())

        content, accepted = read()
        if not accepted and (self.path / EVENTS).exists():
            with self._alone(fcntl.LOCK_SH):  # it may have been written between the two reads
                content, accepted = read()
        if not accepted:
            raise DamagedFile(f"{path} is not what was written: it was changed. Restore it. {advice}.")
        return content

    def made_from(self, path: Path) -> Mapping[str, str]:
        """The hashes of what a file was made from, by name; none of a file that was never entered."""
        entry = self._ledger().files.get(self._name(path))
        return entry.made_from if entry else NOTHING

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The hash of every file that was entered, and those of what it was made from, by name."""
        return self._ledger().files

    @property
    def chain(self) -> Chain:
        """The events as they lie there, with the hash of every line."""
        return read_chain(_bytes_of(self.path / EVENTS))

    def receive(self, name: str, source: Path, entry: Entry) -> None:
        """Copy a file that another folder of this run entered, and enter it here. `source` is that folder / `name`.

        Raises DamagedFile, and keeps nothing, if its content is not what was entered there, if `name` may lead out of
        the folder, or if a link leads to the file.
        """
        path, parts = self.path / name, name.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise DamagedFile(f"{source}: {name!r} is no name of a file in a run folder. Copy its folder again.")
        for there in [source, *source.parents][: len(parts)]:
            if there.is_symlink():
                raise DamagedFile(f"{there} is a link, and what it leads to is not taken. Copy its folder with cp -rL.")
        with self._alone():
            self._store(self._ledger().about_to_write(name, entry))
            with replaced(path, str(os.getpid())) as copy, source.open("rb") as file:
                shutil.copyfileobj(file, copy, 1 << 20)
                copy.flush()
                if sha256_file(Path(copy.name)) != entry.sha256:
                    raise DamagedFile(f"{source} does not match its hash: it was touched. Copy its folder again.")
            self._store(self._ledger().entered(name, entry))

    @property
    def digest(self) -> str | None:
        """A hash over the events and all files of this run so far; None of a run without a list of its files."""
        path = self.path / FILES
        return sha256_file(path) if path.exists() else None

    @property
    def kept(self) -> set[str]:
        """The names, relative to the folder, of the files whose hashes are known."""
        return set(self._ledger().files)

    def breaks(self) -> list[Break]:
        """Every file, by name, that is not what the run left, and what is the matter with it."""
        try:
            ledger = self._ledger()
        except DamagedFile:
            return [Break(FILES, "does not match its hash")]
        content = _bytes_of(self.path / EVENTS)
        chain, found = read_chain(content), list[Break]()
        if not (self.path / FILES).exists():
            return [Break(FILES, "is missing", missing=True)] if chain.ends or chain.problem else []
        if ledger.events is not None and not content:
            found.append(Break(EVENTS, "is missing", missing=not (self.path / EVENTS).exists()))
        elif (problem := _events_problem(chain, ledger)) is not None:
            found.append(Break(EVENTS, problem))
        for name in sorted(ledger.files | ledger.writing):
            path = self.path / name
            if not path.is_file():
                found += [Break(name, "is missing", missing=True)] if name in ledger.files else []
            elif not ledger.accepts(name, sha256_file(path)):
                found.append(Break(name, "does not match its hash"))
        return found

    def check_untouched(self, consequence: str) -> list[Break]:
        """What is missing. Raises DamagedFile that names the first file that was touched, and what follows from it."""
        found = self.breaks()
        if touched := [broken for broken in found if not broken.missing]:
            others = f" (and {len(touched) - 1} more, which `isthmus inspect {self.path}` names)" if touched[1:] else ""
            raise DamagedFile(
                f"{self.path / touched[0].file} {touched[0].what}{others}: it was touched after it was written, and "
                f"{consequence}. Restore it; or delete it, and the run makes it again as far as it can, and its "
                "dossier says so."
            )
        return found

    def go_on(self) -> None:
        """Look at every file before a run continues.

        Raises DamagedFile that names what was touched. What is missing is made again, which an event says.
        """
        found = self.check_untouched("the run does not go on from it")
        with self._alone():
            ledger, missing = self._ledger(), [broken.file for broken in found]
            ledger = _settled(self.path, ledger).without(*missing)
            self._store(ledger.model_copy(update={"events": None}) if EVENTS in missing else ledger)
        for name in missing:
            self.event("run", "fallback", what=f"{name} is made again", why="it is missing, and had been written")

    def event(self, stage: str, event: str, **fields: Any) -> None:
        """Append one line to events.jsonl. `fields` must be JSON; `step` orders repeated events of one kind.

        A `time` among them, in Unix seconds, is that of an event which is told later than it happened.
        Raises DamagedFile if lines are missing that were there.
        """
        told = {"time": round(time.time(), 3), "stage": stage, "event": event, **fields}
        body = json.dumps(told, allow_nan=False).encode()
        path = self.path / EVENTS
        with self._alone(), path.open("rb+") as file, explain_io_errors(path):
            ledger = self._ledger()
            if not (self.path / FILES).exists():
                self._store(ledger)
            before = _ready(file, path, ledger)
            line, sha256 = linked(before, body)
            file.write(line + b"\n")
            file.flush()
            if event != "step":
                os.fdatasync(file.fileno())
                self._store(ledger.model_copy(update={"events": Head(bytes=file.tell(), sha256=sha256)}))

    def events(
        self, stage: str | None = None, event: str | None = None, *, repeated: bool = False
    ) -> list[dict[str, Any]]:
        """Events in order; of those that repeat a step the last counts, or all if `repeated`. What a killed writer tore
        is left out.

        Raises DamagedFile if a line was changed, or lines are missing.
        """
        ledger, content = self._ledger(), _bytes_of(self.path / EVENTS)
        chain = read_chain(content)
        if content and (problem := _events_problem(chain, ledger)) is not None:
            raise DamagedFile(f"{self.path / EVENTS} {problem}. {_RESTORE_EVENTS}")
        kept: dict[Any, dict[str, Any]] = {}
        for number, line in enumerate(chain.bodies):
            entry = json.loads(line) if is_event(line) else {}
            if not isinstance(entry.get("stage"), str) or not isinstance(entry.get("event"), str):
                continue
            if (stage and entry["stage"] != stage) or (event and entry["event"] != event):
                continue
            key = (entry["stage"], entry["event"], entry["step"]) if "step" in entry and not repeated else number
            kept.pop(key, None)
            kept[key] = entry
        return list(kept.values())

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    @contextlib.contextmanager
    def _alone(self, how: int = fcntl.LOCK_EX) -> Iterator[None]:
        """While no other process or thread writes events or the list of files."""
        path = self.path / EVENTS
        with explain_io_errors(path):
            self.path.mkdir(parents=True, exist_ok=True)
            with path.open("ab" if how == fcntl.LOCK_EX else "rb") as file:
                fcntl.flock(file, how)
                yield

    def _reached(self, ledger: Ledger) -> Ledger:
        """With the last whole line of the events, once that is on the disk; a list that knows of more stays."""
        with (self.path / EVENTS).open("rb+") as file:
            end, last = _whole(*_last_lines(file))
            if last is None or (ledger.events is not None and ledger.events.bytes >= end):
                return ledger
            os.fdatasync(file.fileno())
        return ledger.model_copy(update={"events": Head(bytes=end, sha256=last)})

    def _ledger(self) -> Ledger:
        path = self.path / FILES
        return Ledger.from_bytes(read_bytes(path, DamagedFile), path) if path.exists() else Ledger()

    def _store(self, ledger: Ledger) -> None:
        write_atomic(self.path / FILES, ledger.to_bytes())


_RESTORE_EVENTS = "Restore it; or delete it, and the run goes on without what it told, and its dossier says so."


def _bytes_of(path: Path) -> bytes:
    return read_bytes(path, DamagedFile) if path.exists() else b""


def _events_problem(chain: Chain, ledger: Ledger) -> str | None:
    if chain.problem is not None:
        return f"{chain.problem}: it was changed, or lines are missing"
    if ledger.events is not None and not chain.reaches(ledger.events):
        return "ends before the last line that is known to have been written"
    return None


def _settled(folder: Path, ledger: Ledger) -> Ledger:
    """Without files that were being written when the writer was killed: they were, or they were not."""
    for name, entry in ledger.writing.items():
        path = folder / name
        if path.is_file() and sha256_file(path) == entry.sha256:
            ledger = ledger.entered(name, entry)
    return ledger.model_copy(update={"writing": {}})


def _ready(file: IO[bytes], path: Path, ledger: Ledger) -> str:
    """Stand at the end of the last whole line of a file of events; what a killed writer tore is taken away.

    Returns the hash to which the next line is linked.
    """
    lines, start = _last_lines(file)
    if lines[-1] and is_event(lines[-1]):
        file.write(b"\n")
        lines.append(b"")
    end, sha256 = _whole(lines, start)
    if lines[-1]:
        file.truncate(end)
    file.seek(end)
    head = ledger.events
    if head is not None and (head.bytes > end or (head.bytes == end and head.sha256 != sha256)):
        raise DamagedFile(f"{path} ends before the last line that is known to have been written. {_RESTORE_EVENTS}")
    if sha256 is None:
        file.seek(0)
        sha256 = begin(file.read(end))
    return sha256


def _whole(lines: list[bytes], start: int) -> tuple[int, str | None]:
    """Where the last whole line ends, and its hash, of what `_last_lines` gives."""
    end = start + sum(len(line) + 1 for line in lines[:-1])
    return end, unlinked(lines[-2])[1] if len(lines) > 1 else None


def _last_lines(file: IO[bytes]) -> tuple[list[bytes], int]:
    """The end of a file, split at its line ends, with at least one whole line if there is one; and where it starts."""
    size, block = file.seek(0, os.SEEK_END), 1 << 14
    while True:
        start = max(0, size - block)
        file.seek(start)
        lines = file.read(size - start).split(b"\n")
        if start == 0:
            return lines, 0
        if len(lines) > 2:
            return lines[1:], start + len(lines[0]) + 1
        block *= 4


def meant_run(path: Path) -> Path:
    """The run folder of its folder of bundles; any other path as it is."""
    return path.parent if path.name == "bundle" and (path.parent / "recipe.json").is_file() else path


def write_atomic(path: Path, content: bytes) -> None:
    """Write so that a reader sees the old content or the new, never a part; leaves no file behind if it fails."""
    with replaced(path, str(os.getpid())) as file:
        file.write(content)


@contextlib.contextmanager
def replaced(path: Path, writer: str) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when all of it is on the disk, and else vanishes.

    `writer` is in its temporary name: others may write the same file at the same time, and what a killed writer left
    is overwritten by the next of its name.
    """
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    with explain_io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` at the end, or vanishes if its writing fails.

    A reader sees the whole new folder or the old one. Its files are flushed to the disk before it is renamed.
    """
    new, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    with explain_io_errors(folder):
        for left_by_a_killed_writer in (new, old):
            shutil.rmtree(left_by_a_killed_writer, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            yield new
            _fsync_tree(new)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
            fsync_folder(folder.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            fsync_folder(path)
    fsync_folder(folder)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def explain_io_errors(path: Path) -> Iterator[None]:
    """Turn an operating system error into a message for the user; everything already written stays."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise IsthmusError(
                f"no space left on the disk for {path}. Free some and run the same command again."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise IsthmusError(f"{path} cannot be written: {error.strerror}.") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise IsthmusError(f"{path} cannot be made: a file is in the way. Name another folder.") from error
        raise


def _json(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, indent=2).encode() + b"\n"


def _read_json(path: Path) -> Any:
    return read_json(path, DamagedFile)


def difference(old: Recipe, new: Recipe) -> str:
    """The first keys in which two resolved recipes differ."""
    before, after = (_leaves(recipe.model_dump(mode="json", by_alias=True)) for recipe in (old, new))
    names = sorted({name for name, _ in before ^ after})
    return "different " + ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _leaves(tree: Any, prefix: str = "") -> set[tuple[str, str]]:
    """Every value by its place; a table in a list stands under its name."""
    if isinstance(tree, list) and tree and all(isinstance(one, dict) and "name" in one for one in tree):
        tree = {one["name"]: one for one in tree}
    if isinstance(tree, dict):
        return {leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else key)}
    return {(prefix, json.dumps(tree))}
