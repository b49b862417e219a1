"""What governments have said about who may sell, buy and use which chip: dated records, each with its source.

`isthmus.rules` judges by them. They stand here because they name chips and makers.
"""

from __future__ import annotations

import functools
import tomllib
from datetime import date
from importlib import resources
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Side = Literal["US", "CN"]
RecordKind = Literal["rule", "letter", "guidance", "press", "reported"]
Effect = Literal["note", "caution", "licence", "denial"]
EFFECTS: tuple[Effect, ...] = get_args(Effect)
"""Mildest first."""
BINDING: dict[RecordKind, tuple[Effect, ...]] = {
    "rule": EFFECTS,
    "letter": EFFECTS,
    "guidance": EFFECTS[:3],
    "press": EFFECTS[:2],
    "reported": EFFECTS[:2],
}
"""How much a record of each kind may ask for: what the press alone says warns, and never refuses."""


class _Dated(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    since: date
    until: date | None = None
    source: str = Field(min_length=1)

    def holds_on(self, day: date) -> bool:
        """Whether it was in force on a day."""
        return self.since <= day and (self.until is None or day < self.until)


class TradeClass(_Dated):
    """A class of chips by their numbers: one of `any_of` has to hold, each a chain of comparisons with `and`."""

    name: str
    any_of: tuple[str, ...]


class TradeRecord(_Dated):
    """One thing that was said. An empty condition asks for nothing; records.toml says what each field means."""

    side: Side
    kind: RecordKind
    effect: Effect
    day_known: bool = True
    as_of: date
    expires: date
    makers: tuple[str, ...] = ()
    chips: tuple[str, ...] = ()
    not_chips: tuple[str, ...] = ()
    memory: str | None = None
    parents: tuple[str, ...] = ()
    not_parents: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    not_sites: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    state_funded: bool | None = None
    cap: int | None = Field(default=None, gt=0)
    relaxes: tuple[str, ...] = ()
    what: str
    what_zh: str

    @model_validator(mode="after")
    def _asks_no_more_than_its_kind_may(self) -> Self:
        if self.effect not in BINDING[self.kind]:
            raise ValueError(f"{self.id}: a record of kind {self.kind} cannot ask for {self.effect}")
        if self.expires < self.as_of or self.as_of < self.since:
            raise ValueError(
                f"{self.id}: since {self.since}, as of {self.as_of} and expires {self.expires} are disordered"
            )
        return self


class TradeFacts(BaseModel):
    """The whole of records.toml. `ends`: the day of the newest record; nothing later is known here."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    ends: date
    makers: dict[str, str]
    machines: dict[str, str]
    groups: dict[str, tuple[str, ...]]
    classes: tuple[TradeClass, ...] = Field(alias="class")
    records: tuple[TradeRecord, ...] = Field(alias="record")

    def countries(self, names: tuple[str, ...]) -> frozenset[str]:
        """The countries of groups and of single codes."""
        return frozenset(code for name in names for code in self.groups.get(name, (name,)))


@functools.cache
def trade_facts() -> TradeFacts:
    """The records that ship with the package."""
    text = resources.files("isthmus.chips.trade").joinpath("records.toml").read_text(encoding="utf-8")
    return TradeFacts.model_validate(tomllib.loads(text))
