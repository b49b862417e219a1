"""The run folder: typed records, append-only events, atomic writes, and figures that carry their kind.

Stages meet only here. A reader never sees half a record: a write goes to a temporary file, is flushed to disk and
renamed, and the folder is flushed after it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.lines import read_json
from isthmus.recipe.read import resolved_recipe
from isthmus.recipe.schema import Recipe, content_digest

Kind = Literal["measured", "declared", "forecast", "rehearsed"]
_WEAKEST_LAST: tuple[Kind, ...] = ("measured", "declared", "forecast", "rehearsed")
RecordType = TypeVar("RecordType", bound="Record")


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
                    f"{path} belongs to another recipe ({_difference(existing.recipe, recipe)}). "
                    "Name another folder with --run, or delete this one."
                )
            return existing
        with explain_io_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        write_atomic(stored, _json({"sha256": recipe.digest(), "recipe": json.loads(recipe.canonical())}))
        return cls(path, recipe)

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

    def step_folder(self, name: str) -> Path:
        """Where a step of the recipe leaves its record, its checkpoints and what else it makes."""
        return self.path / "steps" / name

    def write_record(self, name: str, record: Record) -> None:
        """Store a record as `name`.json, atomically."""
        write_atomic(self.path / f"{name}.json", record.model_dump_json(indent=2).encode() + b"\n")

    def read_record(self, name: str, kind: type[RecordType]) -> RecordType | None:
        """The record `name`, or None if its stage is not done. Raises DamagedFile if it cannot be read."""
        path = self.path / f"{name}.json"
        if not path.exists():
            return None
        try:
            return kind.model_validate_json(path.read_bytes())
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

    def event(self, stage: str, event: str, **fields: Any) -> None:
        """Append one line to events.jsonl. `fields` must be JSON; `step` orders repeated events of one kind."""
        line = json.dumps({"time": round(time.time(), 3), "stage": stage, "event": event, **fields}, allow_nan=False)
        path = self.path / "events.jsonl"
        with explain_io_errors(path), path.open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(line.encode() + b"\n")

    def events(self, stage: str | None = None, event: str | None = None) -> list[dict[str, Any]]:
        """Events in order. Lines torn by a killed writer are left out; of events that repeat a step the last counts."""
        path = self.path / "events.jsonl"
        if not path.exists():
            return []
        kept: dict[Any, dict[str, Any]] = {}
        for number, line in enumerate(path.read_bytes().splitlines()):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(entry, dict) or not {"stage", "event"} <= entry.keys():
                raise DamagedFile(f"{path}:{number + 1} is not an event of a run; remove the line")
            if (stage and entry["stage"] != stage) or (event and entry["event"] != event):
                continue
            key = (entry["stage"], entry["event"], entry["step"]) if "step" in entry else number
            kept.pop(key, None)
            kept[key] = entry
        return list(kept.values())


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


def _difference(old: Recipe, new: Recipe) -> str:
    """The first keys in which two resolved recipes differ."""
    changed = sorted(_leaves(old.model_dump(mode="json")) ^ _leaves(new.model_dump(mode="json")))
    names = sorted({name for name, _ in changed})
    return "different " + ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _leaves(tree: Any, prefix: str = "") -> set[tuple[str, str]]:
    if isinstance(tree, dict):
        return {leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else key)}
    return {(prefix, json.dumps(tree))}
