"""What a run folder holds, by hash: its events as a chain, and the list of its files.

Each line of events.jsonl ends in a hash over the line before and over itself, so none can be changed, moved or taken
out unseen. How far the chain goes, and the hash of every file that a stage left, stand in files.json, which has a hash
of its own content.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, ValidationError

from isthmus.errors import DamagedFile

EVENTS = "events.jsonl"
FILES = "files.json"
_MARK = b', "chain": "'
_END = b'"}'
_DIGITS = 64


class Head(BaseModel):
    """How far a chain was written: the length of the file in bytes, and the hash of the line that ends there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class Entry(BaseModel):
    """The SHA-256 of a file's bytes, and by name the hashes of what it was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    made_from: dict[str, str] = {}


class Ledger(BaseModel):
    """The content of files.json. `writing` are files that are about to be replaced; names are relative to the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = 1
    events: Head | None = None
    files: dict[str, Entry] = {}
    writing: dict[str, Entry] = {}

    def accepts(self, name: str, sha256: str) -> bool:
        """Whether a file with this hash is the one that was entered, or is just being entered; else it was touched.

        Any content is accepted of a file that was never entered.
        """
        known = [entries[name].sha256 for entries in (self.files, self.writing) if name in entries]
        return not known or sha256 in known

    def entered(self, name: str, entry: Entry) -> Ledger:
        writing = {other: one for other, one in self.writing.items() if other != name}
        return self.model_copy(update={"files": {**self.files, name: entry}, "writing": writing})

    def about_to_write(self, name: str, entry: Entry) -> Ledger:
        return self.model_copy(update={"writing": {**self.writing, name: entry}})

    def without(self, *names: str) -> Ledger:
        files, writing = (
            {name: one for name, one in entries.items() if name not in names} for entries in (self.files, self.writing)
        )
        return self.model_copy(update={"files": files, "writing": writing})

    def to_bytes(self) -> bytes:
        content = self.model_dump(mode="json")
        whole = {"sha256": _content_sha256(content), "list": content}
        return json.dumps(whole, sort_keys=True, indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes, origin: object) -> Ledger:
        """Raises DamagedFile unless the bytes are those that `to_bytes` gave."""
        ledger = None
        with suppress(ValueError, KeyError, TypeError, RecursionError, ValidationError):  # it is damaged, as below
            ledger = cls.model_validate(json.loads(content)["list"])
        if ledger is None or ledger.to_bytes() != content:
            raise DamagedFile(
                f"{origin} does not match its hash. Restore it; or delete it, and the files of the run are from "
                "then on taken as they are, which the dossier says."
            )
        return ledger


def _content_sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Break:
    """A file of a run that is not what the run left. `missing`: it is gone, and can be made again."""

    file: str
    what: str
    missing: bool = False

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


@dataclass
class Chain:
    """Lines of a file of events: `bodies` without their hashes, and by its end in bytes the hash of each chained line.

    `whole` bytes of the file are whole lines. Lines before the first that is chained were written before there were
    chains, and `problem` says of the first line that does not follow from those before it.
    """

    bodies: list[bytes] = field(default_factory=list)
    ends: dict[int, str] = field(default_factory=dict)
    whole: int = 0
    problem: str | None = None

    def reaches(self, head: Head) -> bool:
        """Whether the line is there that ended the chain when `head` was noted."""
        return self.ends.get(head.bytes) == head.sha256


def read_chain(content: bytes) -> Chain:
    """The lines of a file of events. What a killed writer left of its last line is left out."""
    chain, before = Chain(), ""
    for number, line in enumerate(content.split(b"\n"), start=1):
        end = chain.whole + len(line) + 1
        is_last = end > len(content)
        if is_last and not is_event(line):
            return chain
        body, sha256 = unlinked(line)
        if before or sha256 is not None:
            before = before or begin(content[: chain.whole])
            if sha256 != _link(before, body):
                chain.problem = f"line {number} does not follow from the lines before it"
                return chain
            before = sha256
        chain.bodies.append(body)
        if not is_last:
            chain.whole = end
            chain.ends |= {end: before} if before else {}
    return chain


def begin(content: bytes) -> str:
    """What the first line of a chain is linked to: the hash of all bytes before it."""
    return hashlib.sha256(content).hexdigest()


def linked(before: str, body: bytes) -> tuple[bytes, str]:
    """A line without its end, and its hash. `body` is a JSON object in bytes, `before` the hash of the line before."""
    sha256 = _link(before, body)
    return body[:-1] + _MARK + sha256.encode() + _END, sha256


def unlinked(line: bytes) -> tuple[bytes, str | None]:
    """The body of a line and its hash; the line itself and None if it has none."""
    start = len(line) - _DIGITS - len(_END) - len(_MARK)
    if start < 0 or not line.endswith(_END) or line[start : start + len(_MARK)] != _MARK:
        return line, None
    return line[:start] + b"}", line[-_DIGITS - len(_END) : -len(_END)].decode("ascii", "replace")


def is_event(line: bytes) -> bool:
    """Whether a line is a whole event and no part of one."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _link(before: str, body: bytes) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()
